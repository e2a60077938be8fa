"""Guesses of the tokens to come, so that thoughts behind them can be thought at once.

A guess is only ever compared with the token that ``generate`` itself takes from the mixed prediction. So every decoding
of transformers keeps its distribution, whatever is guessed: a wrong guess costs passes and nothing else. To guess what
sampling will take, a drafter samples with the random numbers that sampling will use (a coupling by common random
numbers: Daliri, Musco and Suresh, arXiv 2408.07978): where the two distributions agree, so do the tokens, and with the
same seed a text is the same with drafts and without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import FloatTensor, LongTensor, Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from qstar.generation.naming import CACHE
from qstar.generation.text import TextSoFar
from qstar.generation.thoughts import Reader
from qstar.model import vocabulary_size

# Of transformers' own: a call changes what the next one gives, or runs a function of the user's.
STATEFUL = ("SynthIDTextWatermarkLogitsProcessor", "PrefixConstrainedLogitsProcessor")
LONGEST_MATCH = 3


@dataclass(frozen=True)
class Choice:
    """How ``generate`` takes a token from its logits.

    Attributes:
        processors: those of its logits processors that keep no state; users' own are left out.
        do_sample: whether it samples.
        eos: tokens that end a row, ``[n]`` int64.
        pad: what follows in a row that has ended; None where rows do not end.
    """

    processors: LogitsProcessorList
    do_sample: bool
    eos: Tensor
    pad: int | None

    @classmethod
    def of(cls, processors: Sequence[LogitsProcessor], do_sample: bool, eos: Tensor, pad: int | None) -> Choice:
        """The choice that ``generate`` makes with these prepared processors."""
        kept = [each for each in processors if _is_pure(each)]
        return cls(LogitsProcessorList(kept), do_sample, eos, pad)

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """A token for each row, ``[B]``, after ``tokens`` ``[B, N]``, from ``logits`` ``[B, V]``."""
        scores = self.processors(cast(LongTensor, tokens), cast(FloatTensor, logits.to(torch.float32, copy=True)))
        if self.do_sample:
            p = scores.softmax(-1).nan_to_num(1.0)  # where no token is allowed, as may be of an assistant's
            token = torch.multinomial(p, num_samples=1).squeeze(1)
        else:
            token = scores.argmax(-1)
        return token if self.pad is None else torch.where(self.ended(tokens), self.pad, token)

    def ended(self, tokens: Tensor) -> Tensor:
        """Which rows of ``tokens`` ``[B, N]`` have come to their end, where rows do, ``[B]`` boolean."""
        return torch.isin(tokens[:, -1], self.eos) | (tokens[:, -1] == self.pad)

    def all_ended(self, tokens: Tensor) -> bool:
        """Whether all rows have; the device is not asked where none does."""
        return self.pad is not None and bool(self.ended(tokens).all())


def _is_pure(processor: LogitsProcessor) -> bool:
    kind = type(processor)
    return kind.__module__ == "transformers.generation.logits_process" and kind.__name__ not in STATEFUL


@contextlib.contextmanager
def random_numbers_put_back(device: torch.device) -> Iterator[None]:
    """Leave the random numbers of ``device`` to whoever draws next, as if nothing inside had drawn any."""
    module = torch if device.type == "cpu" else torch.get_device_module(device)
    arguments = () if device.type == "cpu" else (device,)
    state = module.get_rng_state(*arguments)
    try:
        yield
    finally:
        module.set_rng_state(state, *arguments)


class Drafter(Protocol):
    """Guesses tokens.

    Attributes:
        passes: what a guess costs, in passes of the model.
    """

    passes: float

    def draft(self, reader: Reader, text: TextSoFar, count: int, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """At most ``count`` tokens that may follow ``text``.

        Returns:
            The tokens ``[B, d]``, and where they were read on the way, hidden states of the tokens of ``text`` that had
            not been read and of all guesses but the last, ``[B, n + d - 1, E]``; else None.
        """
        ...


class FromModel:
    """Guesses of the model itself, without thoughts: they fill the cache of the text."""

    passes = 1.0

    def draft(self, reader: Reader, text: TextSoFar, count: int, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Drafter.draft`."""
        length, states = text.length, []
        for _ in range(count):
            states.append(reader.read(text))
            logits = reader.head.logits(states[-1][:, -1])
            text = text.followed_by(choice(text.tokens, logits)[:, None])
            if choice.all_ended(text.tokens):
                break
        return text.tokens[:, length:], torch.cat(states, dim=1)


class FromText:
    """Guesses from the text itself: what followed its last few tokens when they stood there before.

    Attributes:
        longest: tokens that are looked for, fewer where so many were not found.
    """

    passes = 0.0

    def __init__(self, longest: int = LONGEST_MATCH):
        self.longest = longest

    def draft(self, reader: Reader, text: TextSoFar, count: int, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Drafter.draft`."""
        padding = [0] * len(text.tokens) if text.padding is None else text.padding.flatten().tolist()
        rows = [
            what_followed(row[left:], self.longest, count)
            for row, left in zip(text.tokens.tolist(), padding, strict=True)
        ]
        width = max(map(len, rows))
        # A row without a guess holds the others up no more than a wrong one would.
        rows = [row + text.tokens[index, -1:].tolist() * (width - len(row)) for index, row in enumerate(rows)]
        return text.tokens.new_tensor(rows).view(len(rows), width), None


def what_followed(tokens: list[int], longest: int, count: int) -> list[int]:
    """Up to ``count`` tokens that stood behind the last occurrence of the text's last ``longest``, or fewer, tokens."""
    for length in range(min(longest, len(tokens) - 1), 0, -1):
        tail = tokens[-length:]
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == tail:
                return tokens[begin + length : begin + length + count]
    return []


class FromAssistant:
    """Guesses of another, smaller model with the same tokens, without thoughts even where it can think."""

    def __init__(self, assistant: PreTrainedModel, passes: float):
        self.assistant = assistant
        self.passes = passes
        self._cache = DynamicCache()
        self._read: Tensor | None = None

    def draft(self, reader: Reader, text: TextSoFar, count: int, choice: Choice) -> tuple[Tensor, Tensor | None]:
        """As :meth:`Drafter.draft`."""
        length, vocabulary = text.length, len(reader.head.weight)
        words = vocabulary_size(self.assistant)
        positions = getattr(self.assistant.config.get_text_config(decoder=True), "max_position_embeddings", None)
        for _ in range(count):
            unknown = bool((text.tokens >= words).any())
            if unknown or (positions is not None and text.length > positions):
                break
            logits = self._next(text)[:, :vocabulary].to(text.tokens.device)
            logits = F.pad(logits, (0, vocabulary - logits.shape[1]), value=-torch.inf)
            text = text.followed_by(choice(text.tokens, logits)[:, None])
            if choice.all_ended(text.tokens):
                break
        return text.tokens[:, length:], None

    def _next(self, text: TextSoFar) -> Tensor:
        """Logits ``[B, V]`` after ``text``, of which it reads what is not in its cache."""
        known = 0 if self._read is None else self._common(self._read, text.tokens)
        if self._read is not None and known < self._read.shape[1]:
            self._cache.crop(known - self._read.shape[1])
        self._read = text.tokens
        mask = None
        if text.padding is not None:
            mask = (torch.arange(text.length, device=text.tokens.device) >= text.padding).long()
        inputs = dict(
            input_ids=text.tokens[:, known:], attention_mask=mask, position_ids=text.positions(known, text.length)
        )
        device = self.assistant.device
        inputs = {name: None if value is None else value.to(device) for name, value in inputs.items()}
        return self.assistant(**inputs, use_cache=True, **{CACHE: self._cache}).logits[:, -1]

    @staticmethod
    def _common(read: Tensor, tokens: Tensor) -> int:
        """How many tokens all rows of two texts begin with, at least one of ``tokens`` left to be read."""
        length = min(read.shape[1], tokens.shape[1] - 1)
        alike = (read[:, :length] == tokens[:, :length]).all(0)
        return int(alike.long().cumprod(0).sum())


class DraftLength:
    """How many tokens to guess: as many as make a token cheapest, if guesses go on being right as often as lately.

    With acceptance a and d guesses a round gives (1 - a^(d+1)) / (1 - a) tokens (Leviathan et al., arXiv 2211.17192,
    section 3) for d times the passes of a guess and K + 1 for the thoughts.

    Attributes:
        most: d at most.
        accepted: guesses that were right.
        drafted: guesses that were compared with what came: up to the first wrong one of each round.
    """

    MEMORY = 0.9  # what a round counts beside the one after it
    PRIOR = (1.0, 3.0)  # guesses that count as right, and as made, before there are any
    PATIENCE = 16  # rounds without guesses at most, before one is tried again: first 1, then 2, 4, ...

    def __init__(self, most: int, thought_passes: int, draft_passes: float):
        self.most = most
        self.accepted = self.drafted = 0
        self._costs = [thought_passes + draft_passes * count for count in range(most + 1)]
        self._right, self._made = self.PRIOR
        self._without, self._wait = 0, 1

    def record(self, right: int, all_right: bool) -> None:
        """Of a round's guesses ``right`` were right, and the next was wrong unless that is ``all_right`` of them."""
        made = right + (not all_right)
        self.accepted, self.drafted = self.accepted + right, self.drafted + made
        self._right, self._made = self._right * self.MEMORY + right, self._made * self.MEMORY + made

    def __call__(self) -> int:
        """How many to guess next; now and then 1 where none would pay, to learn whether they have become right."""
        rate = self._right / self._made
        tokens = [1.0]
        for _ in range(self.most):
            tokens.append(1.0 + rate * tokens[-1])
        best = max(range(self.most + 1), key=lambda count: tokens[count] / self._costs[count])
        if best:
            self._without, self._wait = 0, 1
            return best
        self._without += 1
        if self._without <= self._wait:
            return 0
        self._without, self._wait = 0, min(2 * self._wait, self.PATIENCE)
        return 1


@dataclass
class Guessing:
    """Who guesses, how tokens are taken, and how many at a time.

    Attributes:
        in_batches: guess for several rows as well. A round lasts as long as the guesses of all rows are right.
    """

    drafter: Drafter
    choice: Choice
    lengths: DraftLength
    in_batches: bool

    def guess(self, reader: Reader, text: TextSoFar, most: int) -> tuple[Tensor, Tensor | None]:
        """At most ``most`` tokens, as :meth:`Drafter.draft`."""
        count = 0
        if most > 0 and (self.in_batches or len(text.tokens) == 1):
            count = min(most, self.lengths())
        if not count:
            return text.tokens[:, :0], None
        with random_numbers_put_back(text.tokens.device):
            return self.drafter.draft(reader, text, count, self.choice)
