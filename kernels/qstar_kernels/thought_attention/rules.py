"""What changes a score of thought attention or its weight, apart from who sees whom."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rules(NamedTuple):
    """What changes a score or its weight."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    text_start: Tensor | None = None

    def within(self, positions: int, tokens: int) -> Rules:
        """The same rules, without a window so wide that it hides nothing."""
        idle = self.window is not None and self.window >= positions + tokens
        return self._replace(window=None) if idle else self
