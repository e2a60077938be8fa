"""What a person looks at first: how large a gain is, the best and the worst thoughts, and how values are spread."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

from qstar.inspection.data import DifficultyGain, Document, Inspection, Position

SCALE = (0.05, 0.3, 1.0)  # nats: fixed, so that a colour means the same everywhere
LEVELS = range(-len(SCALE), len(SCALE) + 1)
WEIGHT_SCALE = (0.05, 0.2, 0.5)
SURPRISE_SCALE = (1.0, 2.0, 4.0)  # nats
WEIGHTS = tuple(tenth / 10 for tenth in range(11))

Item = TypeVar("Item")


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


def level(value: float, scale: Sequence[float] = SCALE) -> int:
    """How large a value is on a scale, on both sides of 0: -3 to 3, and 0 where it is below the first bound."""
    size = bisect_right(scale, abs(value))
    return size if value > 0 else -size


def level_name(step: int, scale: Sequence[float] = SCALE) -> str:
    """Which values are at a level."""
    if step == 0:
        return f"-{scale[0]:g} to +{scale[0]:g}"
    sign, size = ("+", step) if step > 0 else ("-", -step)
    low = f"{sign}{scale[size - 1]:g}"
    return f"{low} to {sign}{scale[size]:g}" if size < len(scale) else f"{low} and {'more' if step > 0 else 'less'}"


def difficulty_name(each: DifficultyGain) -> str:
    """Which next tokens are in a bin, by nats without thoughts."""
    return f"{each.least:g} and more" if each.below is None else f"{each.least:g} to {each.below:g}"


def ahead_name(ahead: int) -> str:
    """Which token lies so many ahead of a thought."""
    return "next token" if ahead == 1 else f"{ahead} tokens ahead"


def counted(number: int, what: str) -> str:
    """So many of something, in words."""
    return f"{number} {what}{'' if number == 1 else 's'}"


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
    return outermost([(each.position.gain or 0.0, each) for each in places(inspection)], count)


def outermost(valued: Sequence[tuple[float, Item]], count: int) -> tuple[list[Item], list[Item]]:
    """The ``count`` items of the largest values above 0, and of the lowest below, the outermost first."""
    best = sorted((pair for pair in valued if pair[0] > 0), key=lambda pair: -pair[0])
    worst = sorted((pair for pair in valued if pair[0] < 0), key=lambda pair: pair[0])
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
