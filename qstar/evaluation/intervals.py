"""How far a mean over questions can be trusted, and how far a difference between two rows of answers.

The mean of a sample of questions stands for that over all questions of their kind. A bootstrap interval (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) draws as many questions from the sample, with
replacement, again and again, and holds the middle 95 % of the means. For two rows over the same questions the
difference is taken question by question first, so that what makes a question hard for both cancels.

A bootstrap interval of a proportion of 0 or 1 is a point, since every draw has the same mean, as if nothing were left
to chance. So the accuracy of a single row has Wilson's interval (Wilson, 1927; recommended by Brown, Cai and DasGupta,
Interval Estimation for a Binomial Proportion, 2001); probabilities, log-likelihoods and paired differences have the
bootstrap's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 10_000
BLOCK = 1 << 22  # numbers drawn at a time: 16 MiB, and 32 MiB of values


class Interval(NamedTuple):
    """Bounds of a quantity, both NaN where nothing can be said."""

    low: float
    high: float


class Changes(NamedTuple):
    """How right and wrong answers changed from one row to another over the same questions.

    Attributes:
        repaired: wrong there, right here.
        broken: right there, wrong here.
    """

    repaired: int
    broken: int

    @property
    def p_value(self) -> float:
        """McNemar's, exact and two-sided: of a change at least as lopsided where either direction is as likely.

        McNemar, 1947; the binomial tail of what changed, at one half. 1 where nothing changed.
        """
        changed = self.repaired + self.broken
        ways, tail = 1, 0
        for fewer in range(min(self) + 1):
            tail += ways
            ways = ways * (changed - fewer) // (fewer + 1)
        return min(1.0, 2 * tail / 2**changed)


def wilson(right: int, asked: int) -> Interval:
    """Wilson's 95 % interval of a proportion; within 0 and 1, and never a point.

    Args:
        right: how many are.
        asked: of how many.

    Raises:
        ValueError: nothing was asked, or more is right than was asked.
    """
    if not 0 <= right <= asked or asked == 0:
        raise ValueError(f"right is {right} of asked {asked}, but it must be between 0 and asked, which is at least 1")
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, spread = right / asked, z * z / asked
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return Interval(0.0 if right == 0 else middle - half, 1.0 if right == asked else middle + half)


def bootstrap(values: ArrayLike, *, counts: ArrayLike | None = None, seed: int = 0) -> Interval:
    """The 95 % percentile bootstrap interval of a mean.

    Its bounds are means that were drawn, without interpolation, so that an infinite value makes a bound infinite and
    nothing NaN. Of constant values it is a point, exactly. Of one value, or of none with terms, it is NaN: there is no
    spread to see.

    Args:
        values: one for each question, ``[n]``; with ``counts`` a sum for each.
        counts: how many terms each sum has, ``[n]``, so that the mean is that of all terms, and whole sums are drawn;
            sums of no terms are left out.
        seed: of the draws.

    Raises:
        ValueError: there are no values, or not as many counts.
    """
    sums = np.asarray(values, dtype=np.float64)
    terms = None if counts is None else np.asarray(counts, dtype=np.float64)
    if sums.ndim != 1 or (terms is not None and terms.shape != sums.shape):
        shapes = f"shape {sums.shape}" if terms is None else f"shape {sums.shape} and counts {terms.shape}"
        raise ValueError(f"values have {shapes}, but they must be [n]")
    if len(sums) == 0:
        raise ValueError("values are empty, but an interval needs at least one")
    if terms is not None:
        sums, terms = sums[terms > 0], terms[terms > 0]
    if len(sums) < 2 or np.isnan(sums).any():
        return Interval(math.nan, math.nan)
    if terms is None and (sums == sums[0]).all():  # whose mean would be rounded
        return Interval(float(sums[0]), float(sums[0]))
    low, high = np.quantile(_drawn_means(sums, terms, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Interval(float(low), float(high))


def bootstrap_columns(sums: ArrayLike, counts: ArrayLike, *, seed: int = 0) -> list[Interval]:
    """The 95 % intervals of several means over the same questions, as :func:`bootstrap`, all from the same draws.

    For many means, as of each kind of question and each row: the draws are made once. A question without terms of a
    kind stays among those that are drawn, unlike there; draws without any term of a kind say nothing of it.

    Args:
        sums: of each question, a column for each mean, ``[n, c]``.
        counts: how many terms each sum has, ``[n, c]``.
        seed: of the draws.

    Returns:
        An interval for each column; NaN where fewer than two questions have terms.

    Raises:
        ValueError: the two are not of one shape, or hold no question.
    """
    values, terms = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if values.ndim != 2 or values.shape != terms.shape or len(values) == 0:
        raise ValueError(
            f"sums have shape {values.shape} and counts {terms.shape}, but they must be [n, c] with n at least 1"
        )
    weights = _drawn_weights(len(values), seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ values) / (weights @ terms)
    found = []
    for column, known in zip(means.T, (terms > 0).sum(0), strict=True):
        there = column[~np.isnan(column)]
        if known < 2 or not len(there):
            found.append(Interval(math.nan, math.nan))
        else:
            low, high = np.quantile(there, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
            found.append(Interval(float(low), float(high)))
    return found


def paired(values: Sequence[float], reference: Sequence[float], *, seed: int = 0) -> Interval:
    """The 95 % interval of the mean of ``values - reference``, question by question, see :func:`bootstrap`.

    Raises:
        ValueError: they are not as many, or none.
    """
    if len(values) != len(reference):
        raise ValueError(f"values are {len(values)} and reference {len(reference)}, but they must be paired")
    with np.errstate(invalid="ignore"):  # infinity less infinity: what cannot be told is NaN, and so is the interval
        return bootstrap(np.subtract(np.asarray(values, np.float64), reference), seed=seed)


def changes(right: Sequence[bool], reference: Sequence[bool]) -> Changes:
    """How many answers a row has repaired and broken beside those of ``reference``.

    Raises:
        ValueError: they are not as many.
    """
    if len(right) != len(reference):
        raise ValueError(f"right are {len(right)} and reference {len(reference)}, but they must be paired")
    pairs = list(zip(right, reference, strict=True))
    return Changes(sum(here and not there for here, there in pairs), sum(there and not here for here, there in pairs))


def _drawn_means(sums: NDArray[np.float64], terms: NDArray[np.float64] | None, seed: int) -> NDArray[np.float64]:
    """Of ``RESAMPLES`` draws, a block at a time."""
    generator, questions = np.random.default_rng(seed), len(sums)
    means = []
    for start in range(0, RESAMPLES, rows := max(1, BLOCK // questions)):
        drawn = generator.integers(questions, size=(min(rows, RESAMPLES - start), questions), dtype=np.int32)
        means.append(sums.take(drawn).sum(1) / (questions if terms is None else terms.take(drawn).sum(1)))
    return np.concatenate(means)


@functools.lru_cache(maxsize=2)
def _drawn_weights(questions: int, seed: int) -> NDArray[np.float64]:
    """How often each question is in each of ``RESAMPLES`` draws, ``[RESAMPLES, questions]``."""
    generator = np.random.default_rng(seed)
    drawn = (generator.integers(questions, size=questions, dtype=np.int32) for _ in range(RESAMPLES))
    return np.stack([np.bincount(each, minlength=questions) for each in drawn]).astype(np.float64)
