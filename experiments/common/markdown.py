"""Results as tables of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column to the left and the others to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def with_interval(mean: float, interval: Sequence[float], *, sign: str = "", digits: int = 3) -> str:
    """A mean with its interval, as ``+0.120 [+0.080, +0.160]``."""
    bounds = ", ".join(f"{bound:{sign}.{digits}f}" for bound in interval if not isnan(bound))
    return f"{mean:{sign}.{digits}f}" + (f" [{bounds}]" if bounds else "")
