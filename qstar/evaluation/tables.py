"""Results as plain text tables, and as JSON can say them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qstar.evaluation.held_out import Evaluation, perplexity


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in ([*zip(row, widths, strict=True)] for row in (header, *rows))
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "  ".join("-" * width for width in widths), *lines[1:]))


def evaluation_table(result: Evaluation) -> str:
    """The held-out log-likelihood with and without thoughts, by how far ahead the token lies and how hard it is."""
    rows = [
        [f"{ahead} ahead", f"{-base:.4f}", f"{-talk:.4f}", f"{base - talk:+.4f}"]
        for ahead, (base, talk) in enumerate(zip(result.nll_base_ahead, result.nll_talk_ahead, strict=True), start=1)
    ]
    header = ["log-likelihood (nats per token)", "without thoughts", "with thoughts", "gain"]
    by_ahead = table(header, rows)
    summary = (
        f"{result.tokens} tokens predicted; mean mixing weight {result.mixing_weight:.3f}; "
        f"perplexity {perplexity(result.nll_base):.3f} without and {perplexity(result.nll_talk):.3f} with thoughts"
    )
    return "\n\n".join(filter(None, (by_ahead, _intervals_line(result), _difficulty_table(result), summary)))


def _intervals_line(result: Evaluation) -> str:
    """95 % intervals of the gains; nothing where there are none."""
    known = [each for each in enumerate(result.gain_intervals, start=1) if not math.isnan(each[1].low)]
    shown = [f"{ahead} ahead [{interval.low:+.4f}, {interval.high:+.4f}]" for ahead, interval in known]
    return f"95 % intervals of the gain, over rows: {', '.join(shown)}" if shown else ""


def _difficulty_table(result: Evaluation) -> str:
    """The next tokens by how hard they are without thoughts; nothing where that was not found."""
    rows = [
        [
            f"{each.least:g} and more" if math.isinf(each.below) else f"{each.least:g} to {each.below:g}",
            str(each.tokens),
            f"{-each.nll_base:.4f}",
            f"{-each.nll_talk:.4f}",
            f"{each.nll_base - each.nll_talk:+.4f}",
        ]
        for each in result.difficulties
    ]
    header = ["next tokens by nats without thoughts", "tokens", "without thoughts", "with thoughts", "gain"]
    return table(header, rows) if rows else ""


def finite_or_none(value: Any) -> Any:
    """``value`` as JSON can say it: null for numbers that are infinite or NaN."""
    if isinstance(value, dict):
        return {name: finite_or_none(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
