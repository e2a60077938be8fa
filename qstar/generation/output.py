"""What ``generate`` returns when it is asked for more than tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

Output = GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


@dataclass(frozen=True)
class ThinkingReport:
    """What thinking took.

    Attributes:
        tokens: that were generated, over all rows, those after the end of a row not counted.
        thought_share: of the tokens, those that a thought came before.
        passes: through the model, one after the other; those over the prompt included.
        drafted: tokens that were guessed and compared with what came.
        accepted: guesses that were right in all rows.
    """

    tokens: int
    thought_share: float
    passes: int
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were right; None where there were none."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass
class ThinkingOutput(GenerateDecoderOnlyOutput):
    """As ``GenerateDecoderOnlyOutput`` of transformers, and the thoughts.

    Attributes:
        thoughts: before each generated token, ``[B, L, K]`` int64; the end token in all places where there was none.
        thought_weights: of each thought in the mix, ``[B, L]``; 0 where there was none.
        thought_at: where there was one, ``[B, L]`` boolean.
        thinking: what it took.
    """

    thoughts: Tensor | None = None
    thought_weights: Tensor | None = None
    thought_at: Tensor | None = None
    thinking: ThinkingReport | None = None


@dataclass
class ThinkingBeamOutput(GenerateBeamDecoderOnlyOutput):
    """As ``GenerateBeamDecoderOnlyOutput`` of transformers, and the thoughts, as in :class:`ThinkingOutput`."""

    thoughts: Tensor | None = None
    thought_weights: Tensor | None = None
    thought_at: Tensor | None = None
    thinking: ThinkingReport | None = None


def with_thoughts(output: Output, report: ThinkingReport, **thoughts: Any) -> ThinkingOutput | ThinkingBeamOutput:
    """``output`` of transformers' ``generate`` with what was thought, by the names of :class:`ThinkingOutput`."""
    kind = ThinkingBeamOutput if isinstance(output, GenerateBeamDecoderOnlyOutput) else ThinkingOutput
    given = {each.name: getattr(output, each.name) for each in fields(output)}
    return kind(**given, **thoughts, thinking=report)
