"""What changes a score of thought attention or its weight, and where its queries stand."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Rules(NamedTuple):
    """What changes a score or its weight, and where its queries stand.

    ``positions`` [B, Nq] are the text positions of the queries of a step or a part: the last ones where it is None.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    text_start: Tensor | None = None
    positions: Tensor | None = None

    def within(self, positions: int, tokens: int) -> Rules:
        """The same rules, without a window so wide that it hides nothing."""
        idle = self.window is not None and self.window >= positions + tokens
        return self._replace(window=None) if idle else self

    def starts(self, length: int, queries: int) -> Tensor | None:
        """``text_start`` at the positions of the queries, [B, Nq]."""
        if self.text_start is None:
            return None
        if self.positions is None:
            return self.text_start[:, length - queries :]
        return self.text_start.gather(1, self.positions)
