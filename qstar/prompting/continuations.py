"""What a model says to prompts, in batches, with what it thought and whether it was right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from qstar.generation.model import GeneratingModel
from qstar.generation.output import ThinkingReport
from qstar.generation.refusals import check_without_thoughts
from qstar.generation.settings import GenerationSettings
from qstar.generation.streaming import ThoughtStreamer
from qstar.prompting.prompts import Prompt, check_length, padded, prompt_tokens
from qstar.prompting.settings import SearchSettings, padding_token


@dataclass(frozen=True)
class Continuation:
    """What was said to a prompt.

    Attributes:
        prompt: it.
        text: so that it stands right behind the prompt.
        shown: the same with thoughts in their places, where they are wanted.
        thoughts: before each token as ``text`` and ``weight``, None where there was none; None where not wanted.
    """

    prompt: Prompt
    text: str
    shown: str
    thoughts: list[dict[str, Any] | None] | None

    @property
    def right(self) -> bool | None:
        """Whether it is the answer, but for space around it; None where there is no answer."""
        return None if self.prompt.answer is None else self.text.strip() == self.prompt.answer.strip()

    def record(self) -> dict[str, Any]:
        """For a line of JSON."""
        found: dict[str, Any] = {"prompt": self.prompt.text, "text": self.text}
        if self.right is not None:
            found |= {"answer": self.prompt.answer, "right": self.right}
        return found if self.thoughts is None else found | {"thoughts": self.thoughts}


def check_shown(settings: GenerationSettings, show_thoughts: bool) -> None:
    """Refuse thinking settings without thoughts, before a model is loaded.

    Raises:
        ValueError: one would have no effect.
    """
    if settings.think is False:
        check_without_thoughts(settings, False, {})
    if show_thoughts and (settings.think is False or settings.when.never):
        why = "think is False" if settings.think is False else "think_when is 'never'"
        raise ValueError(f"show_thoughts is given, but {why}: there are no thoughts to show")


def check_plain(settings: GenerationSettings, show_thoughts: bool) -> None:
    """Refuse thinking settings for a model that :func:`qstar.wrap` has not taught to think.

    Raises:
        ValueError: one would have no effect.
    """
    if show_thoughts or settings not in (GenerationSettings(), GenerationSettings(think=False)):
        what = "show_thoughts is given" if show_thoughts else f"the thinking is to be {settings}"
        raise ValueError(f"{what}, but the model is a plain one, which has no thoughts: qstar.wrap() gives it some")


class Continuations:
    """Continues prompts, and keeps account of the thinking.

    Attributes:
        model: in ``eval()``, on the device that is to be used; one that thinks, or any other of transformers.
        tokenizer: its own.
        tokens: that were generated so far.
        reports: of the thinking, one for each batch; none where the model does not think.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        search: SearchSettings,
        *,
        show_thoughts: bool = False,
        dimmed: bool = False,
    ):
        """
        Raises:
            ValueError: a setting would have no effect.
        """
        check_shown(settings, show_thoughts)
        if not isinstance(model, GeneratingModel):
            check_plain(settings, show_thoughts)
        self.model: Any = model
        self.tokenizer = tokenizer
        self.settings, self.search = settings, search
        self.show_thoughts, self.dimmed = show_thoughts, dimmed
        search.check_effect(model.generation_config)
        self.tokens = 0
        self.reports: list[ThinkingReport] = []

    def of(
        self, prompts: Sequence[Prompt], batch_size: int, streamer: BaseStreamer | None = None
    ) -> Iterator[Continuation]:
        """The continuations in the order of the prompts, those of one prompt after each other.

        Args:
            prompts: all are checked before the first is continued.
            batch_size: rows at a time. Greedy continuations do not depend on it; sampled ones do.
            streamer: is told of each token, of a single prompt.

        Raises:
            ValueError: a prompt cannot be read or is too long, named by its number.
        """
        rows = prompt_tokens(self.tokenizer, prompts)
        for number, row in enumerate(rows, 1):
            try:
                check_length(self.model, self.settings, len(row), self.search.max_new_tokens)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        self.search.set_seed(self.model.generation_config)
        batches = [slice(begin, begin + batch_size) for begin in range(0, len(rows), batch_size)]
        return (each for here in batches for each in self._batch(prompts[here], rows[here], streamer))

    def _batch(
        self, prompts: Sequence[Prompt], rows: list[list[int]], streamer: BaseStreamer | None
    ) -> Iterator[Continuation]:
        config, thinking = self.model.generation_config, {}
        if isinstance(self.model, GeneratingModel):
            thinking = asdict(self.settings) | {"output_thoughts": self.show_thoughts}
        tokens, mask = padded(rows, padding_token(config, self.tokenizer) or 0)
        output = self.model.generate(
            tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            return_dict_in_generate=True,
            streamer=streamer,
            **thinking,
            **self.search.arguments(config, self.tokenizer, tokens.shape[1]),
        )
        if (report := getattr(output, "thinking", None)) is not None:
            self.reports.append(report)
        said = output.sequences[:, tokens.shape[1] :].cpu()
        returned = len(said) // len(rows)
        for number, row in enumerate(said):
            thoughts = None
            if self.show_thoughts:
                kinds = (output.thoughts, output.thought_weights, output.thought_at)
                thoughts = [each[number].cpu() for each in kinds]
            yield self._continuation(prompts[number // returned], rows[number // returned], row, thoughts)

    def _continuation(
        self, prompt: Prompt, row: list[int], said: Tensor, thoughts: list[Tensor] | None
    ) -> Continuation:
        """From tokens ``[L]`` and thoughts, weights and where there were any, ``[L, ...]``, up to the row's end."""
        eos = self.model.generation_config.eos_token_id
        ends = eos if isinstance(eos, list) else [eos]
        pieces: list[str] = []
        streamer = ThoughtStreamer(self.tokenizer, pieces.append, show_thoughts=self.show_thoughts, dimmed=self.dimmed)
        streamer.put(torch.tensor([row]))
        records: list[dict[str, Any] | None] = []
        for place, token in enumerate(said):
            if thoughts is not None:
                thought, weight, thought_at = (each[place] for each in thoughts)
                streamer.put_thoughts(thought[None], weight[None], thought_at[None])
                records.append(
                    {"text": self.tokenizer.decode(thought), "weight": float(weight)} if thought_at else None
                )
            streamer.put(token[None])
            self.tokens += 1
            if int(token) in ends or any(text in streamer.text for text in self.search.stop):
                break
        streamer.end()
        return Continuation(prompt, streamer.text, "".join(pieces), None if thoughts is None else records)

    def report(self) -> str:
        """What the thinking took so far, in a line."""
        if not self.reports:
            return f"{self.tokens} tokens without thoughts"
        tokens = sum(each.tokens for each in self.reports)
        thought = sum(each.thought_share * each.tokens for each in self.reports) / max(tokens, 1)
        passes = sum(each.passes for each in self.reports)
        drafted, accepted = (sum(getattr(each, name) for each in self.reports) for name in ("drafted", "accepted"))
        guesses = f"{accepted / drafted:.1%} of {drafted} guesses right" if drafted else "no guesses"
        return f"thought before {thought:.1%} of {tokens} tokens, in {passes} passes; {guesses}"


def accuracy_line(continuations: Sequence[Continuation]) -> str | None:
    """How many are right, in a line; None where there are no answers."""
    judged = [each.right for each in continuations if each.right is not None]
    if not judged:
        return None
    return f"accuracy {sum(judged) / len(judged):.1%} ({sum(judged)} of {len(judged)})"
