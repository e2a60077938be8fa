"""One call of ``generate``: what transformers is given, and what is made of what it returns."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import GenerateBeamDecoderOnlyOutput

from qstar.generation.cache import Speaking, ThinkingCache
from qstar.generation.drafts import (
    LONGEST_MATCH,
    Choice,
    Drafter,
    DraftLength,
    FromAssistant,
    FromModel,
    FromText,
    Guessing,
)
from qstar.generation.naming import CACHE
from qstar.generation.output import Output, ThinkingBeamOutput, ThinkingOutput, ThinkingReport, with_thoughts
from qstar.generation.refusals import (
    asked_for,
    check_asked,
    check_assistant,
    check_drafts,
    check_processors,
    check_room,
)
from qstar.generation.settings import MOST_DRAFTS, GenerationSettings
from qstar.generation.thoughts import Reader
from qstar.model import QuietStarModel

FOR_GUESSES = ("assistant_model", "prompt_lookup_num_tokens", "max_matching_ngram_size")


class Call:
    """A call of ``generate`` with thoughts.

    Attributes:
        arguments: what transformers' ``generate`` is given.
        cache: carries the text from token to token.
    """

    def __init__(
        self, model: QuietStarModel, settings: GenerationSettings, output_thoughts: bool, arguments: dict[str, Any]
    ):
        check_asked(model, arguments)
        if output_thoughts and not asked_for(model, arguments, "return_dict_in_generate"):
            raise ValueError(
                "output_thoughts is True, but return_dict_in_generate is not: there is nothing to hold them"
            )
        self.model, self.settings, self.output_thoughts = model, settings, output_thoughts
        self._guesses = {name: asked_for(model, arguments, name) for name in FOR_GUESSES}
        self._synced = bool(arguments.get("synced_gpus"))
        self.arguments = {name: value for name, value in arguments.items() if name not in FOR_GUESSES}
        self.arguments["use_cache"] = True
        if isinstance(config := self.arguments.get("generation_config"), GenerationConfig):
            self.arguments["generation_config"] = config = copy.deepcopy(config)
            config.update(**dict.fromkeys(FOR_GUESSES[1:]))
        self._streamer = arguments.get("streamer")
        thought_tokens = settings.thought_tokens or model.qstar.thought_tokens
        past: ThinkingCache | None = self.arguments.pop(CACHE, None)
        self.cache = ThinkingCache(thought_tokens) if past is None else past
        self.cache.hold(thought_tokens)

    def begin(
        self, config: GenerationConfig, prompt_length: int, mask: Tensor | None, processors: LogitsProcessorList
    ) -> None:
        """Take what transformers has prepared, before the first pass.

        Args:
            config: complete.
            prompt_length: tokens of the prompt, padding included.
            mask: of the prompts, ``[B, N]``; None where there is no padding.
            processors: of the logits.

        Raises:
            ValueError: tokens cannot be guessed as was asked; the text would outgrow what the model knows.
        """
        model, settings = self.model, self.settings
        beams = config.num_beams or 1
        if beams > 1 and hasattr(model, "_reorder_cache"):
            raise ValueError(f"num_beams is {beams}, but {type(model).__name__} reorders a cache of its own kind")
        self.config, self.prompt_length = config, prompt_length
        check_processors(processors)
        lengths = (prompt_length, prompt_length)
        if mask is not None:
            lengths = (int(mask.sum(1).min()), int(mask.sum(1).max()))
        new_tokens = int(config.max_length) - prompt_length
        check_room(model, self.cache.thought_tokens, lengths, new_tokens, self._first_pass(lengths[0], prompt_length))
        reader = Reader(
            model,
            thought_tokens=self.cache.thought_tokens,
            when=settings.when,
            temperature=settings.thought_temperature,
            seed=settings.thought_seed,
            returned=1 if beams > 1 else config.num_return_sequences or 1,
            cache=self.cache.keys,
        )
        self.speaking = self.cache.speaking = Speaking(
            reader,
            prompt_length=prompt_length,
            max_length=int(config.max_length),
            guessing=self._guessing(beams, processors),
            listener=getattr(self._streamer, "put_thoughts", None),
        )

    def _first_pass(self, shortest: int, prompt_length: int) -> int | None:
        """How many tokens of the shortest prompt are read first where a cache or chunks say so, see ``check_room``."""
        padding = prompt_length - shortest
        if self.cache.text is not None:
            return self.cache.text.length - padding
        if self.config.prefill_chunk_size is not None:
            return min(self.config.prefill_chunk_size, prompt_length) - padding
        return None

    def _guessing(self, beams: int, processors: LogitsProcessorList) -> Guessing | None:
        if check_drafts(self.settings, self._guesses | dict(synced_gpus=self._synced), beams) is not None:
            return None
        asked = self._guesses["prompt_lookup_num_tokens"] or self.settings.drafts
        drafter = self._drafter()
        return Guessing(
            drafter,
            Choice.of(processors, bool(self.config.do_sample), self._eos(), self._pad()),
            DraftLength(asked or MOST_DRAFTS, self.cache.thought_tokens + 1, drafter.passes),
            in_batches=asked is not None or self._guesses["assistant_model"] is not None,
        )

    def _drafter(self) -> Drafter:
        assistant = self._guesses["assistant_model"]
        if assistant is not None:
            check_assistant(self.model, assistant)
            sizes = [sum(x.numel() for x in each.parameters()) for each in (assistant, self.model)]
            return FromAssistant(assistant, sizes[0] / sizes[1])
        if self._guesses["prompt_lookup_num_tokens"] is not None:
            return FromText(self._guesses["max_matching_ngram_size"] or LONGEST_MATCH)
        return FromModel()

    def _eos(self) -> Tensor:
        eos = self.config.eos_token_id
        return torch.as_tensor([] if eos is None else eos, dtype=torch.int64, device=self.model.device).flatten()

    def _pad(self) -> int | None:
        """What transformers fills a row with after its end; None where rows have none."""
        eos = self._eos().tolist()
        return (eos[0] if self.config.pad_token_id is None else self.config.pad_token_id) if eos else None

    def result(self, output: Tensor | Output) -> Tensor | ThinkingOutput | ThinkingBeamOutput:
        """What ``generate`` returns, of what that of transformers has returned."""
        if isinstance(output, Tensor):
            return output
        self.speaking.look_back(was_wrong=False)
        thoughts, weights, where = self._in_order(output)
        valid = self._valid(output)
        guessing = self.speaking.guessing
        report = ThinkingReport(
            tokens=int(valid.sum()),
            thought_share=float((where & valid).sum() / valid.sum().clamp(min=1)),
            passes=self.speaking.reader.passes,
            drafted=0 if guessing is None else guessing.lengths.drafted,
            accepted=0 if guessing is None else guessing.lengths.accepted,
        )
        if not self.output_thoughts:
            return with_thoughts(output, report)
        return with_thoughts(
            output,
            report,
            thoughts=thoughts.masked_fill(~valid[..., None], self.model.qstar.end_token_id),
            thought_weights=weights.masked_fill(~valid, 0),
            thought_at=where & valid,
        )

    def _in_order(self, output: Output) -> list[Tensor]:
        """Thoughts, weights and where thought was, ``[B, L, ...]``, of the sequences that are returned."""
        length = output.sequences.shape[1] - self.prompt_length
        steps = self.speaking.said[:length]
        said = [torch.stack(each, dim=1) for each in zip(*steps, strict=True)]
        beams = getattr(output, "beam_indices", None)
        if beams is None:
            return said
        step = torch.arange(length, device=beams.device).expand(len(beams), -1)
        return [each[beams[:, :length].clamp(min=0), step] for each in said]

    def _valid(self, output: Output) -> Tensor:
        """Which generated tokens belong to their text, ``[B, L]``: not those that fill a row after its end."""
        said = output.sequences[:, self.prompt_length :]
        pad = self._pad()
        if pad is None or (len(said) == 1 and not isinstance(output, GenerateBeamDecoderOnlyOutput)):
            return torch.ones_like(said, dtype=torch.bool)
        ends = torch.isin(said, self._eos().to(said.device))
        filling = (said == pad).long().flip(1).cumprod(1).flip(1).bool()  # at a row's end, also after a stop string
        return (ends.cumsum(1) == ends) & (ends | ~filling)
