"""Before which tokens a model thinks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

FORMS = "'always', 'never', 'every:N' for each N-th position, or 'entropy:H' for a base entropy above H nats"


@dataclass(frozen=True)
class ThinkWhen:
    """A rule that says at which positions a thought is worth its passes.

    Attributes:
        every: think at positions that are a multiple of it, counted from the text's first token; 0 for none.
        entropy: think where the entropy of the base model's next token is above it, nats; None for all positions.
    """

    every: int = 1
    entropy: float | None = None

    @classmethod
    def parse(cls, text: str) -> ThinkWhen:
        """Read ``always``, ``never``, ``every:N`` or ``entropy:H``.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(text, str):
            if text in ("always", "never"):
                return cls(every=int(text == "always"))
            if (found := re.fullmatch(r"every:(\d+)", text)) and int(found[1]):
                return cls(every=int(found[1]))
            if (found := re.fullmatch(r"entropy:([\d.eE+-]+)", text)) and _is_threshold(found[1]):
                return cls(entropy=float(found[1]))
        raise ValueError(f"think_when is {text!r}, but it must be {FORMS}")

    @property
    def never(self) -> bool:
        """Whether there is no position to think at."""
        return not self.every

    def __call__(self, positions: Tensor, base_logits: Tensor) -> Tensor:
        """Where to think, ``[B, Nq]`` boolean.

        Args:
            positions: of the tokens in their texts, ``[B, Nq]`` int64.
            base_logits: of the tokens that follow, without thoughts, ``[B, Nq, V]``.
        """
        if not self.every:
            return torch.zeros_like(positions, dtype=torch.bool)
        if self.entropy is not None:
            log_p = base_logits.log_softmax(-1)
            return torch.special.entr(log_p.exp()).sum(-1) > self.entropy
        return positions % self.every == 0


def _is_threshold(text: str) -> bool:
    try:
        return isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False
