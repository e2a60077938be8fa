"""Text that is sampled so that it does not depend on the batch: random numbers are those of a row's own text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from qstar.prompting.settings import SearchSettings, padding_token


def seed_of_repeat(seed: int, repeat: int) -> int:
    """The given one for the first repeat, from 0; for others below 2^64 one that no neighbouring seed has."""
    return int.from_bytes(hashlib.sha256(f"{seed} {repeat}".encode()).digest()[:8]) if repeat else seed


@dataclass(kw_only=True)
class SeededSearch(SearchSettings):
    """Greedy search, over logits with noise where there is a temperature.

    Attributes:
        text_temperature: tokens are sampled at, by :class:`SeededSampling`; 0 takes the most probable one.
        text_seed: of the sampling.
    """

    text_temperature: float = 0.0
    text_seed: int = 0

    def arguments(
        self, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> dict[str, Any]:
        """See :class:`qstar.prompting.settings.DecodingSettings`."""
        given = super().arguments(config, tokenizer, prompt_length)
        if self.text_temperature:
            sampling = SeededSampling(self.text_temperature, self.text_seed, padding_token(config, tokenizer) or 0)
            given["logits_processor"] = LogitsProcessorList([sampling])
        return given


class SeededSampling(LogitsProcessor):
    """Makes the most probable token one that is sampled: ``argmax(logits / T + Gumbel noise)``.

    The noise follows from the seed and the text of the row, padding aside. So a row is continued in the same way in any
    batch, and by any number of guesses at once.
    """

    def __init__(self, temperature: float, seed: int, padding: int):
        """
        Args:
            temperature: T, above 0.
            seed: any integer.
            padding: the token on the left of shorter texts.
        """
        self.temperature, self.seed, self.padding = temperature, seed, padding

    def __call__(self, input_ids: LongTensor, scores: FloatTensor) -> Tensor:
        """Noisy logits ``[B, V]`` for texts ``[B, N]``."""
        noise = torch.stack([self._noise(row, scores.shape[-1]) for row in input_ids.tolist()])
        return scores / self.temperature + noise.to(scores)

    def _noise(self, row: list[int], vocabulary: int) -> Tensor:
        begin = next((place for place, token in enumerate(row) if token != self.padding), len(row))
        digest = hashlib.sha256(f"{self.seed} {row[begin:]}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        return -torch.empty(vocabulary).exponential_(generator=generator).log()
