"""What was measured of every variant, over the same tokens or questions, and how two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qstar.evaluation.controls import CONTROLS
from qstar.evaluation.intervals import Interval, bootstrap_columns
from qstar.evaluation.report import ACCURACY, LOG_LIKELIHOOD, TaskReport
from qstar.evaluation.run import BEFORE, OWN_THOUGHTS, WITHOUT
from real.settings import BASE, EQUAL_OPERATIONS, PLAIN, VARIANTS

Array = NDArray[np.float64]
Key = tuple[str, str]  # a variant, and a way in which it predicts
Values = dict[Key, dict[int, Array]]  # by the seed of the training, sums ``[U, G]``
REFERENCES: tuple[Key, ...] = ((BASE, WITHOUT), (PLAIN, WITHOUT), (EQUAL_OPERATIONS, WITHOUT))
OWN_WITHOUT = "itself, without thoughts"
UNTRAINED = -1  # in the place of a seed, of the base
WAYS = (WITHOUT, OWN_THOUGHTS, *CONTROLS)
ALL = "all"
STEPS = ((1, 2), (3, 3), (4, 4), (5, None))  # of the reference solution, first and last
QUARTERS = ("easiest quarter", "second quarter", "third quarter", "hardest quarter")


class Groups(NamedTuple):
    """Kinds of tokens or questions.

    Attributes:
        names: G of them, of which the first is ``"all"``.
        counts: how many terms each of the U rows of text, or questions, has in each, ``[U, G]``.
    """

    names: tuple[str, ...]
    counts: Array


class Difference(NamedTuple):
    """A mean, or the mean of a difference, in each group with its 95 % interval over rows of text or questions."""

    means: list[float]
    intervals: list[Interval]

    def as_json(self) -> dict[str, Any]:
        """As JSON can say it."""
        return {"mean": self.means, "interval": [list(each) for each in self.intervals]}


def mean_of(sums: Array, counts: Array) -> Difference:
    """Means of sums ``[U, G]`` over ``counts`` ``[U, G]`` terms."""
    total = counts.sum(0)
    means = np.divide(sums.sum(0), total, out=np.full(len(total), np.nan), where=total > 0)
    return Difference(means.tolist(), bootstrap_columns(sums, counts))


def summed(values: Values, groups: Groups) -> list[dict[str, Any]]:
    """Every variant in every way: its mean over its seeds, each seed's own, and how it differs from the references.

    A difference is taken row by row, or question by question, over the seeds that both have; the base has none, and is
    the same for all. So an interval says how far other text would change the difference; how far another training
    would, ``by_seed`` shows.
    """
    return [
        {
            "variant": variant,
            "way": way,
            "seeds": sorted(seeds.keys() - {UNTRAINED}),
            **mean_of(np.mean([*seeds.values()], axis=0), groups.counts).as_json(),
            "by_seed": [mean_per_group(seeds[seed], groups.counts) for seed in sorted(seeds)],
            "against": {
                name: found.as_json()
                for name, reference in _references(variant)
                if reference != (variant, way) and (found := _difference(seeds, values.get(reference), groups))
            },
        }
        for (variant, way), seeds in sorted(values.items(), key=lambda item: _place(*item[0]))
    ]


def _place(variant: str, way: str) -> tuple[int, int]:
    """Where it stands in a table."""
    return (BASE, *VARIANTS).index(variant), WAYS.index(way)


def mean_per_group(sums: Array, counts: Array) -> list[float]:
    """Means of sums ``[U, G]``, without intervals."""
    total = counts.sum(0)
    return np.divide(sums.sum(0), total, out=np.full(len(total), np.nan), where=total > 0).tolist()


def _references(variant: str) -> list[tuple[str, Key]]:
    named = [(name, (name, way)) for name, way in REFERENCES]
    return named if variant in (BASE, PLAIN, EQUAL_OPERATIONS) else [*named, (OWN_WITHOUT, (variant, WITHOUT))]


def _difference(seeds: dict[int, Array], reference: dict[int, Array] | None, groups: Groups) -> Difference | None:
    """Of a variant from a reference, over the seeds of both; None where they have none in common."""
    if not reference:
        return None
    if UNTRAINED in reference:
        reference = dict.fromkeys(seeds, reference[UNTRAINED])
    both = [mine - reference[seed] for seed, mine in seeds.items() if seed in reference]
    return mean_of(np.mean(both, axis=0), groups.counts) if both else None


def quarters_of_text(rows: NDArray[np.int64], base: Array) -> tuple[Groups, NDArray[np.int64]]:
    """Tokens by how hard the base finds them: all, and quarters of about as many; and the quarter of each token.

    Args:
        rows: of the text that each token stands in, ``[T]``.
        base: log-probability of each without thoughts, ``[T]``.
    """
    quarter = np.searchsorted(np.quantile(-base, [0.25, 0.5, 0.75]), -base, side="right")
    return Groups((ALL, *QUARTERS), sums_of_text(np.ones_like(base), rows, quarter)), quarter


def sums_of_text(values: Array, rows: NDArray[np.int64], quarter: NDArray[np.int64]) -> Array:
    """Values of tokens ``[T]`` added up by row and quarter, all tokens first, ``[U, 1 + 4]``."""
    count = int(rows.max()) + 1
    each = [np.bincount(rows, values * (quarter == number), count) for number in range(len(QUARTERS))]
    return np.stack([np.bincount(rows, values, count), *each], axis=1)


def steps_of_questions(report: TaskReport) -> Groups:
    """Questions by the steps of their reference solutions, lines that are not empty; all alone where there are none."""
    questions = report.questions.questions
    every = np.ones((len(questions), 1))
    if any(each.rationale is None for each in questions):
        return Groups((ALL,), every)
    steps = np.array([sum(bool(line.strip()) for line in (each.rationale or "").splitlines()) for each in questions])
    names, columns = [ALL], [every[:, 0]]
    for first, last in STEPS:
        upto = "" if last == first else " and more" if last is None else f" to {last}"
        names.append(f"{first}{upto} steps")
        columns.append(((steps >= first) & (steps <= (last or steps.max()))).astype(float))
    return Groups(tuple(names), np.stack(columns, axis=1))


def values_of_task(reports: Sequence[tuple[str, int, TaskReport]], groups: Groups) -> dict[str, Values]:
    """Log-likelihood and accuracy of every row of every report, of a variant and seed, by the metric's name."""
    found: dict[str, Values] = {LOG_LIKELIHOOD: {}, ACCURACY: {}}
    for variant, seed, report in reports:
        for row in report.rows:
            if row.name == BEFORE:  # which is the base
                continue
            for metric, values in found.items():
                scores = row.values(metric)
                if scores is not None:
                    values.setdefault((variant, row.name), {})[seed] = np.array(scores)[:, None] * groups.counts
    return found
