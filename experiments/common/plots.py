"""A rung of the ladder as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from common.summary import Row, by_length


def draw_rung(name: str, rows: Sequence[Row], path: Path) -> None:
    """Draw how often each row is right, every seed a dot; beside it accuracy against K, where models differ in it.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # an extra; without pyplot, which would choose a window system

    lengths = by_length(rows)
    longest = max(row.tokens for row in rows)
    shown = [row for row in rows if row.tokens == longest]
    figure = Figure(figsize=(13 if len(lengths) > 1 else 8, 1.5 + 0.26 * len(shown)), layout="constrained")
    left, *right = figure.subplots(1, 2 if len(lengths) > 1 else 1, squeeze=False)[0]
    labels = [f"{row.variant}: {row.reads}" for row in shown]
    left.barh(labels, [fmean(map(row.accuracy, row.answers)) for row in shown], color="C0", alpha=0.6, height=0.6)
    for place, row in enumerate(shown):
        left.plot([row.accuracy(seed) for seed in row.answers], [place] * len(row.answers), "k.", markersize=4)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.set_xlabel(f"{name}: accuracy on unseen problems, mean and seeds")
    for axes in right:
        needed = sorted({steps for row in rows for each in row.steps.values() for steps in each})
        for number, steps in enumerate(needed):
            means = [fmean(row.accuracy(seed, steps) for seed in row.answers) for _, row in sorted(lengths.items())]
            color = f"C{number}"
            axes.plot(sorted(lengths), means, color=color, marker="o", label=f"{steps} steps")
        axes.set_ylim(0, 1)
        axes.set_xlabel("tokens of a thought, K")
        axes.set_ylabel("accuracy, mean over seeds")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
