"""A rung of the ladder as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from common.summary import Row, by_length, steps_of


def draw_rung(name: str, rows: Sequence[Row], path: Path) -> None:
    """Draw how often each row is right, every seed a dot; beside it accuracy against K, where thoughts are cut.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # an extra; without pyplot, which would choose a window system

    lengths = by_length(rows)
    figure = Figure(figsize=(8 + 4.5 * len(lengths), 1.5 + 0.26 * len(rows)), layout="constrained")
    left, *right = figure.subplots(1, 1 + len(lengths), squeeze=False)[0]
    labels = [f"{row.variant}: {row.reads}" for row in rows]
    left.barh(labels, [fmean(map(row.accuracy, row.answers)) for row in rows], color="C0", alpha=0.6, height=0.6)
    for place, row in enumerate(rows):
        left.plot([row.accuracy(seed) for seed in row.answers], [place] * len(row.answers), "k.", markersize=4)
    left.invert_yaxis()
    left.set_xlim(0, 1)
    left.set_xlabel(f"{name}: accuracy on unseen problems, mean and seeds")
    for axes, (variant, own) in zip(right, lengths.items(), strict=True):
        for number, steps in enumerate(steps_of(own)):
            means = [fmean(row.accuracy(seed, steps) for seed in row.answers) for row in own]
            tokens = [row.tokens for row in own]
            axes.plot(tokens, means, color=f"C{number}", marker="o", label=f"{steps} steps")
        axes.set_ylim(0, 1)
        axes.set_xlabel(f"tokens of its thoughts that {variant} reads, K")
        axes.set_ylabel("accuracy, mean over seeds")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
