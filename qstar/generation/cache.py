"""What ``generate`` carries from token to token: a cache of transformers that answers a forward pass with thoughts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qstar.cache import ThoughtCache
from qstar.generation.drafts import Guessing
from qstar.generation.naming import CACHE
from qstar.generation.text import TextSoFar
from qstar.generation.thoughts import Predictions, Reader

# What ``generate`` hands to any model and a pass needs not, or knows itself.
UNNEEDED = (
    *(CACHE, "use_cache", "logits_to_keep", "position_ids", "cache_position", "return_dict"),
    "tokenizer",  # of stop strings
)
CURES = {"token_type_ids": ": ask the tokenizer for none, return_token_type_ids=False"}


@dataclass
class Ahead:
    """Predictions at the end of a text and behind guesses, and how far generation has followed the guesses.

    Attributes:
        predictions: at ``d + 1`` positions.
        guesses: ``[B, d]`` int64.
        at: the position that was asked for last.
    """

    predictions: Predictions
    guesses: Tensor
    at: int = 0

    def follows(self, tokens: Tensor) -> bool:
        """Whether ``tokens`` ``[B, 1]`` are what was guessed to come next, in all rows."""
        return self.at < self.guesses.shape[1] and torch.equal(tokens[:, 0], self.guesses[:, self.at])


class Speaking:
    """One call of ``generate``: how it thinks and guesses, and what it has thought.

    Attributes:
        reader: reads text and thoughts into the cache.
        prompt_length: tokens that are there before the first is generated, padding included.
        max_length: at most so many tokens, those of the prompt included.
        guessing: makes guesses; None to think token by token.
        said: for each token what came before it: the thoughts ``[B, K]``, their weights ``[B]``, and whether there was
            one at all, ``[B]`` boolean.
        listener: is told of each of these.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        prompt_length: int,
        max_length: int,
        guessing: Guessing | None,
        listener: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ):
        self.reader = reader
        self.prompt_length, self.max_length = prompt_length, max_length
        self.guessing, self.listener = guessing, listener
        self.said: list[tuple[Tensor, Tensor, Tensor]] = []
        self._ahead: Ahead | None = None

    def next_logits(self, text: TextSoFar) -> Tensor:
        """Logits ``[B, V]`` after ``text``, whose last token is new."""
        ahead = self._ahead
        if ahead is not None and ahead.follows(text.tokens[:, -1:]):
            ahead.at += 1
        else:
            self.look_back(was_wrong=ahead is not None and ahead.at < ahead.guesses.shape[1])
            ahead = self._ahead = self._look_ahead(text)
        here, at = ahead.predictions, ahead.at
        self.said.append((here.thoughts[:, at], here.weight[:, at], here.thought_at[:, at]))
        if self.listener is not None:
            self.listener(*self.said[-1])
        return here.logits[:, at]

    def look_back(self, was_wrong: bool) -> None:
        """Take note of how many guesses were right, and whether the next ``was_wrong``; forget the others."""
        if self._ahead is not None and self.guessing is not None and self._ahead.guesses.shape[1]:
            self.guessing.lengths.record(self._ahead.at, not was_wrong)
        self._ahead = None

    def _look_ahead(self, text: TextSoFar) -> Ahead:
        reader, length = self.reader, text.length
        reader.cache.cut(min(reader.cache.text_length, length - 1))
        reader.cache.let_go()
        if reader.cache.text_length < length - 1:
            reader.read(TextSoFar(text.tokens[:, :-1], text.padding))
        if self.guessing is None:
            return Ahead(reader.predict(text), text.tokens[:, :0])
        most = self.max_length - length - 1  # guesses whose next token can still be wanted
        guesses, bases = self.guessing.guess(reader, text, most)
        return Ahead(reader.predict(text.followed_by(guesses), guesses.shape[1], bases), guesses)


class ThinkingCache(Cache):
    """The text of a generation as far as ``generate`` has read it, and keys and values of it in a cache of our own.

    A forward pass that is given one is answered by :meth:`answer`.

    Attributes:
        text: what has been read; None before the first pass.
        keys: keys and values of the text, and while guesses are open of these.
        speaking: the call of ``generate`` that is under way; None between them.
    """

    def __init__(self, thought_tokens: int):
        super().__init__(layers=[])
        self.text: TextSoFar | None = None
        self.keys = ThoughtCache(rationales=1, rationale_length=thought_tokens + 2)
        self.speaking: Speaking | None = None

    @property
    def thought_tokens(self) -> int:
        """K of the thoughts that there is room for."""
        return self.keys.rationale_length - 2

    def hold(self, thought_tokens: int) -> None:
        """Make room for thoughts of K = ``thought_tokens``."""
        self.keys.drop_thoughts()
        self.keys.rationale_length = thought_tokens + 2

    def answer(self, input_ids: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> CausalLMOutputWithPast:
        """What the model's forward pass returns: logits ``[B, 1, V]`` of what follows the last token.

        Args:
            input_ids: tokens that have not been read, ``[B, n]``.
            attention_mask: of the text with them, ``[B, N]``, 0 for padding on the left.
            rest: whatever else ``generate`` gives a model; what would change the result is refused.

        Raises:
            ValueError: no ``generate`` is under way; an argument that thoughts do not know; the mask has padding
                elsewhere than on the left, or another than before.
        """
        if self.speaking is None:
            raise ValueError(f"{CACHE} is a ThinkingCache, which model.generate(think=True) reads alone")
        for name, value in rest.items():
            if name not in UNNEEDED and value is not None and value is not False and value != {}:
                cure = CURES.get(name, "")
                raise ValueError(f"{name} is given, but generating with thoughts does not know it{cure}")
        speaking = self.speaking
        text = self.text = self._take_in(input_ids, attention_mask, speaking.prompt_length)
        if text.length < speaking.prompt_length:  # a part of a prompt that is read in chunks
            logits = speaking.reader.head.logits(speaking.reader.read(text)[:, -1])
        else:
            logits = speaking.next_logits(text)
        cache: dict[str, Any] = {CACHE: self}
        return CausalLMOutputWithPast(logits=logits[:, None], **cache)

    def _take_in(self, tokens: Tensor, mask: Tensor | None, prompt_length: int) -> TextSoFar:
        before = self.text
        if before is not None and len(tokens) != len(before.tokens):
            raise ValueError(f"{CACHE} holds {len(before.tokens)} rows, but input_ids has {len(tokens)}")
        text = TextSoFar(tokens) if before is None else before.followed_by(tokens)
        if mask is None or (before is not None and before.length >= prompt_length):
            return text  # what is generated is never padding
        text = text.under(mask)
        if before is not None and not text.begins_with_padding_of(before):
            raise ValueError(f"attention_mask must have the padding of the text that {CACHE} holds")
        if text.length >= prompt_length and text.padding is not None and int(text.padding.max()) == text.length:
            raise ValueError(f"attention_mask hides all of row {int(text.padding.argmax())}: there is no text to go on")
        return text

    @contextlib.contextmanager
    def left_usable(self) -> Iterator[None]:
        """Forget the guesses at the end, so that the cache can go on into another call.

        A pass that was broken off leaves layers with texts of different lengths: then the text is forgotten as well,
        and the next call reads all of it.
        """
        try:
            yield
        except BaseException:
            if self.speaking is not None and self.speaking.reader.passes:
                self.text = None
                self.keys = ThoughtCache(rationales=1, rationale_length=self.keys.rationale_length)
            raise
        finally:
            self.speaking = None
            if self.text is not None:
                self.keys.cut(min(self.keys.text_length, self.text.length))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that have been read, padding included."""
        return 0 if self.text is None else self.text.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``b`` what was row ``beam_idx[b]``, ``[B]`` int64."""
        assert self.text is not None
        self.text = self.text.rows(beam_idx)
        self.keys.take_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, ``[B']`` int64."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        assert self.text is not None
        self.reorder_cache(
            torch.arange(len(self.text.tokens), device=self.text.tokens.device).repeat_interleave(repeats)
        )

    @property
    def batch_size(self) -> int:
        """Rows; -1 before the first pass."""
        return -1 if self.text is None else len(self.text.tokens)

    @property
    def is_compileable(self) -> bool:
        """A round's passes depend on what is said."""
        return False

    @property
    def is_croppable(self) -> bool:
        """``generate`` does not take tokens back."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """The text in it is not given again, as it would be to layers that hold a state alone."""
        return [False]

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: layers put nothing into it themselves."""
        raise ValueError(f"{CACHE} is a ThinkingCache, which model.generate(think=True) reads alone")

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: nothing is taken back."""
        raise ValueError("a ThinkingCache cannot be cropped: generate() goes on from all that it holds")
