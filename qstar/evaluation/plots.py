"""What was answered, as a picture."""

from __future__ import annotations

from math import isfinite
from pathlib import Path

from qstar.evaluation.report import ACCURACY, LOG_LIKELIHOOD, Mean, TaskReport

LABELS = {ACCURACY: "accuracy", LOG_LIKELIHOOD: "log-likelihood (nats)"}


def draw_report(report: TaskReport, path: str | Path) -> str:
    """Draw accuracy and log-likelihood of every row with their 95 % intervals, and say so in a line.

    Args:
        report: whose rows are drawn.
        path: an .svg or .png file.

    Returns:
        Where it was drawn; or that it was not, since matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # an extra; without pyplot, which would choose a window system
    except ModuleNotFoundError:
        return "no plot is drawn, since matplotlib is missing: pip install matplotlib"
    known = {
        metric: {name: mean for name, means in report.means.items() if (mean := means[metric]) and isfinite(mean.value)}
        for metric in LABELS
    }
    panels = {metric: means for metric, means in known.items() if means}
    names = [*report.means]
    figure = Figure(figsize=(3 + 3.5 * len(panels), 1.5 + 0.4 * len(names)), layout="constrained")
    for axes, (metric, means) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, mean in means.items():
            color = "C0" if name == report.reference.name else "C1"
            axes.errorbar(mean.value, names.index(name), xerr=_arms(mean), fmt="o", color=color, capsize=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first row on top, as in the table
        axes.set_xlabel(LABELS[metric])
        axes.grid(axis="x", alpha=0.3)
        axes.label_outer()
    figure.suptitle(f"{report.task}, {len(report.questions.questions)} questions, 95 % intervals", fontsize=11)
    figure.savefig(path, dpi=110)
    return f"drawn to {path}"


def _arms(mean: Mean) -> list[list[float]]:
    """How far an interval reaches to both sides; NaN, which is not drawn, where it has no bounds."""
    return [[mean.value - mean.interval.low], [mean.interval.high - mean.value]]
