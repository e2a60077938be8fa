"""Curves over the steps of a training, as what a template draws: places in an SVG of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from math import floor, log10
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 46, 230, 12, 120  # of the field in which the curves lie
LABEL = 12  # units between names of curves
DASHES = ("", "7 3", "2 3", "7 3 2 3", "1 6")  # so that curves differ in more than colour
TICKS = 3  # about so many beside an axis


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: at its end; empty for one that stands alone.
        values: of the curve, one for each step.
        low: of a band around it; None, or None for a step, where there is none.
        high: of the band.
    """

    name: str
    values: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


def line_chart(title: str, steps: Sequence[int], lines: Sequence[Line]) -> dict[str, Any]:
    """A chart whose vertical scale holds 0 and all values.

    Args:
        title: above it.
        steps: in ascending order.
        lines: one value for each step.
    """
    bounds = [value for line in lines for some in (line.values, line.low, line.high) for value in some]
    known = [0.0, *(value for value in bounds if value is not None)]
    ticks = _ticks(min(known), max(known))
    low, high = min(min(known), ticks[0]), max(max(known), ticks[-1])
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def x(step: int) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / (last - first), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    ends = _spread([y(line.values[-1]) for line in lines])
    return {
        "title": title,
        "named": any(line.name for line in lines),
        "lines": [
            {
                "name": line.name,
                "dash": dash,
                "points": " ".join(f"{x(step)},{y(value)}" for step, value in zip(steps, line.values, strict=True)),
                "dots": [(x(step), y(value)) for step, value in zip(steps, line.values, strict=True)],
                "band": _band(steps, line, x, y),
                "end": end,
                "last": f"{line.values[-1]:.3f}",
            }
            for line, dash, end in zip(lines, cycle(DASHES), ends, strict=False)
        ],
        "ticks": [(y(value), f"{value:g}") for value in ticks],
        "zero": y(0),
        "places": [x(step) for step in steps],
        "steps": (first, steps[-1]),
        "field": (LEFT, RIGHT, TOP, BOTTOM),
    }


def _band(steps: Sequence[int], line: Line, x: Any, y: Any) -> str:
    """The outline of a band: along its upper side, and back along the lower one."""
    pairs = zip(steps, line.low, line.high, strict=True) if line.low else ()
    known = [(step, low, high) for step, low, high in pairs if low is not None and high is not None]
    upper = [f"{x(step)},{y(high)}" for step, _, high in known]
    return " ".join(upper + [f"{x(step)},{y(low)}" for step, low, _ in reversed(known)])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers that lie from ``low`` to ``high``, 0 among them; one beyond where there would be 0 alone."""
    span = high - low or 1.0
    size = 10.0 ** floor(log10(span / TICKS))
    size = next(size * factor for factor in (1, 2, 5, 10) if span / (size * factor) <= TICKS)
    slack = 1e-9 * size  # of three times a tenth
    ticks = [number * size for number in range(-TICKS - 1, TICKS + 2) if low - slack <= number * size <= high + slack]
    return [float(f"{value:.12g}") for value in (ticks if len(ticks) > 1 else [0.0, size])]


def _spread(places: Sequence[float]) -> list[float]:
    """Places of names, at least ``LABEL`` apart and inside the picture, in the order of the curves' ends."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    spread, least = [0.0] * len(places), TOP + 0.0
    for number in order:
        spread[number] = max(places[number], least)
        least = spread[number] + LABEL
    most = BOTTOM + LABEL + 0.0
    for number in reversed(order):
        spread[number] = min(spread[number], most)
        most = spread[number] - LABEL
    return spread
