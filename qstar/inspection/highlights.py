"""What a person looks at first: how large a gain is, the best and the worst thoughts, and how values are spread."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from qstar.inspection.data import Document, Inspection, Position

SCALE = (0.05, 0.3, 1.0)  # nats: fixed, so that a colour means the same everywhere
LEVELS = range(-len(SCALE), len(SCALE) + 1)
WEIGHTS = tuple(tenth / 10 for tenth in range(11))


class Place(NamedTuple):
    """A position in an inspection.

    Attributes:
        number: of the document, from 0.
        document: it itself.
        position: in it.
    """

    number: int
    document: Document
    position: Position


def level(gain: float) -> int:
    """How large a gain is on the scale, -3 to 3; 0 where it is below 0.05 nats."""
    size = bisect_right(SCALE, abs(gain))
    return size if gain > 0 else -size


def level_name(step: int) -> str:
    """Which gains are at a level, in nats."""
    if step == 0:
        return f"between -{SCALE[0]:g} and +{SCALE[0]:g}"
    sign, size = ("+", step) if step > 0 else ("-", -step)
    low = f"{sign}{SCALE[size - 1]:g}"
    return f"{low} to {sign}{SCALE[size]:g}" if size < len(SCALE) else f"{low} and {'more' if step > 0 else 'less'}"


def places(inspection: Inspection) -> list[Place]:
    """Where a next token is predicted, in the order of the text."""
    return [
        Place(number, document, position)
        for number, document in enumerate(inspection.documents)
        for position in document.positions
        if position.gain is not None
    ]


def extremes(inspection: Inspection, count: int) -> tuple[list[Place], list[Place]]:
    """The ``count`` largest gains for a next token, and losses, the largest first; equal ones as in the text."""
    known = [(each.position.gain or 0.0, each) for each in places(inspection)]
    best = sorted((pair for pair in known if pair[0] > 0), key=lambda pair: -pair[0])
    worst = sorted((pair for pair in known if pair[0] < 0), key=lambda pair: pair[0])
    return [each for _, each in best[:count]], [each for _, each in worst[:count]]


def histogram(values: Iterable[float], bounds: Sequence[float]) -> list[int]:
    """How many values are below the first bound, between each two, and from the last on; bounds are of upper bins."""
    counts = [0] * (len(bounds) + 1)
    for value in values:
        counts[bisect_right(bounds, value)] += 1
    return counts


def bin_names(bounds: Sequence[float]) -> list[str]:
    """What the bins of :func:`histogram` are called."""
    between = [f"{low:g} to {high:g}" for low, high in pairwise(bounds)]
    return [f"below {bounds[0]:g}", *between, f"{bounds[-1]:g} and more"]
