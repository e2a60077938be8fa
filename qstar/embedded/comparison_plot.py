"""Quiet-STaR beside its ancestors, as a picture."""

from __future__ import annotations

from pathlib import Path

from qstar.ancestors.star import StarResult
from qstar.evaluation.intervals import wilson
from qstar.evaluation.report import TaskReport

PLOT_FILE = "compare.png"


def draw_comparison(report: TaskReport, rounds: dict[str, StarResult], path: Path) -> None:
    """Draw how often each row is right, and beside it the rounds of STaR, all with their 95 % intervals.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # an extra; without pyplot, which would choose a window system

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    names = [each.name for each in report.rows]
    counts = [(sum(answer.right for answer in each.answers), len(each.answers)) for each in report.rows]
    shares, below, above = _with_errors(counts)
    left.barh(names, shares, xerr=[below, above], color="C0", ecolor="black", capsize=3, height=0.6)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.set_xlabel(f"accuracy on {counts[0][1]} unseen problems, 95 % interval")
    for number, (name, result) in enumerate(rounds.items()):
        found = [result.before or 0, *(each.right or 0 for each in result.rounds)]
        shares, below, above = _with_errors([(each, result.held_out) for each in found])
        right.errorbar(range(len(found)), shares, [below, above], color=f"C{number}", marker="o", capsize=3, label=name)
    right.set_ylim(0, 1)
    right.set_xlabel("round")
    right.set_ylabel("accuracy on held-out problems")
    right.grid(alpha=0.3)
    right.legend()
    figure.savefig(path, dpi=110)


def _with_errors(counts: list[tuple[int, int]]) -> tuple[list[float], list[float], list[float]]:
    """Shares, and how far their intervals reach below and above them."""
    shares = [right / total for right, total in counts]
    intervals = [wilson(right, total) for right, total in counts]
    below = [max(share - low, 0.0) for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [max(high - share, 0.0) for share, (_, high) in zip(shares, intervals, strict=True)]
    return shares, below, above
