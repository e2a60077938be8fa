"""The summary as a picture: how the log-likelihood of every variant differs from the base's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qstar.evaluation.report import LOG_LIKELIHOOD
from qstar.training.curves import can_draw
from real.settings import BASE


def draw(sections: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for the text and each task into a .png or .svg file; nothing without matplotlib or results."""
    panels = []
    for section in sections:
        entries = [each for each in section["metrics"][LOG_LIKELIHOOD] if BASE in each["against"]]
        if entries:
            panels.append((section, entries))
    if not panels or not can_draw():
        return
    from matplotlib.figure import Figure  # an extra

    names = list(dict.fromkeys(f"{each['variant']}, {each['way']}" for _, entries in panels for each in entries))
    figure = Figure(figsize=(3.5 + 3.5 * len(panels), 1.5 + 0.3 * len(names)), layout="constrained")
    for axes, (section, entries) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for each in entries:
            place = names.index(f"{each['variant']}, {each['way']}")
            mean, (low, high) = each["against"][BASE]["mean"][0], each["against"][BASE]["interval"][0]
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
            ours = [one[0] - (each["mean"][0] - mean) for one in each["by_seed"]]
            axes.plot(ours, [place] * len(ours), "|", color="C1")
        axes.axvline(0.0, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top, as in the table
        axes.set_xlabel(f"{section['name']}: nats per {section['unit']} beyond the base")
        axes.grid(axis="x", alpha=0.3)
        axes.label_outer()
    figure.suptitle("95 % intervals, and each seed", fontsize=11)
    figure.savefig(path, dpi=110)
