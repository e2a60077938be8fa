"""Curves of what a run has logged, as a picture."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CURVES_FILE = "curves.png"


@dataclass(frozen=True)
class Panel:
    """One of the pictures beside each other.

    Attributes:
        title: above it.
        unit: beside it.
        lines: the labels of its lines, by what each is called in the log.
        from_zero: whether zero is in it, which makes small changes look small.
    """

    title: str
    unit: str
    lines: dict[str, str]
    from_zero: bool = False


PANELS = (
    Panel("Loss", "", {"loss": "loss", "eval_loss": "held out"}),
    Panel(
        "Negative log-likelihood",
        "nats per token",
        {
            "nll_base": "without thoughts",
            "nll_talk": "with thoughts",
            "eval_nll_base": "held out, without",
            "eval_nll_talk": "held out, with",
        },
    ),
    Panel("Reward", "nats", {"reward": "reward"}),
    Panel("Mixing weight", "", {"mixing_weight": "in training", "eval_mixing_weight": "held out"}),
    Panel("Entropy of thoughts", "nats", {"thought_entropy": "entropy"}, from_zero=True),
    Panel(
        "Kinds of thoughts",
        "share",
        {"distinct_thoughts": "distinct thoughts", "thought_repetition": "repeated tokens"},
        from_zero=True,
    ),
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, none where it is missing; a line that a kill has cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def points(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """The steps at which ``name`` was logged and its values; of a step that was taken twice, the last one's.

    NaN, which interrupts a line, stands where a value was not finite.
    """
    by_step = {each["step"]: each[name] for each in records if name in each}
    steps = sorted(by_step)
    return steps, [math.nan if by_step[step] is None else by_step[step] for step in steps]


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(records: list[dict[str, Any]], path: Path) -> bool:
    """Draw what ``PANELS`` names and the records of a run hold, and say whether there was anything.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # an extra; without pyplot, which would choose a window system

    if not any(points(records, name)[0] for panel in PANELS for name in panel.lines):
        return False
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    for axes, panel in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for number, (name, label) in enumerate(panel.lines.items()):
            steps, values = points(records, name)
            if not steps:
                continue
            held_out = name.startswith("eval_")
            color = f"C{number - len(panel.lines) // 2 if held_out else number}"
            marker = "o" if held_out or len(steps) == 1 else None
            axes.plot(steps, values, "--" if held_out else "-", label=label, color=color, marker=marker, markersize=4)
        axes.set_title(panel.title, fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(panel.unit)
        axes.grid(alpha=0.3)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
        if len(axes.lines) > 1:
            axes.legend(fontsize=9)
    figure.savefig(path, dpi=110)
    return True
