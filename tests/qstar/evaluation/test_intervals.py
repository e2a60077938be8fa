"""Intervals and changes, against figures by hand, by the normal approximation, and by counting."""

from __future__ import annotations

from itertools import product
from math import inf, isnan, sqrt
from statistics import NormalDist

import numpy as np
import pytest

from qstar.evaluation import intervals
from qstar.evaluation.intervals import Changes, Interval, bootstrap, bootstrap_columns, changes, paired, wilson


def some(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, size=n)


@pytest.mark.parametrize("right, asked, low, high", [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)])
def test_wilson_intervals_are_those_that_are_published(right, asked, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3; without an answer, or with all, one is exact."""
    assert wilson(right, asked) == pytest.approx((low, high), abs=5e-5)
    z = NormalDist().inv_cdf(0.975)
    assert wilson(0, asked) == (0.0, pytest.approx(z**2 / (asked + z**2)))
    assert wilson(asked, asked) == (pytest.approx(asked / (asked + z**2)), 1.0)


def test_the_bounds_of_a_wilson_interval_are_where_the_score_test_just_rejects():
    z = NormalDist().inv_cdf(0.975)
    for bound in wilson(7, 23):
        assert abs(7 / 23 - bound) / sqrt(bound * (1 - bound) / 23) == pytest.approx(z)


def test_nothing_asked_has_no_wilson_interval():
    for right, asked in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match=f"right is {right} of asked {asked}"):
            wilson(right, asked)


def test_a_bootstrap_interval_is_that_of_a_plain_loop():
    values = some(7)
    generator = np.random.default_rng(5)
    means = sorted(np.mean([values[i] for i in generator.integers(7, size=7, dtype=np.int32)]) for _ in range(10_000))
    assert bootstrap(values, seed=5) == pytest.approx((means[249], means[9749]), rel=1e-12)


def test_a_bootstrap_interval_of_many_values_is_the_normal_one():
    values = some(2000)
    half = NormalDist().inv_cdf(0.975) * values.std() / sqrt(2000)
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_nineteen_of_twenty_bootstrap_intervals_hold_the_mean():
    found = [bootstrap(some(60, seed), seed=seed) for seed in range(200)]
    assert 0.90 <= np.mean([low <= 2.0 <= high for low, high in found]) <= 0.98


def test_draws_in_blocks_are_those_at_once(monkeypatch):
    whole = bootstrap(some(11))
    monkeypatch.setattr(intervals, "BLOCK", 64)
    assert bootstrap(some(11)) == whole


def test_the_seed_decides_a_bootstrap_interval():
    assert bootstrap(some(30), seed=1) == bootstrap(some(30), seed=1) != bootstrap(some(30), seed=2)


def test_constant_values_have_a_point_and_one_value_has_nothing():
    assert bootstrap([0.1] * 7) == Interval(0.1, 0.1)
    for lonely in (bootstrap([0.3]), bootstrap([0.3, 0.0], counts=[2, 0]), bootstrap([0.0, 0.0], counts=[0, 0])):
        assert all(map(isnan, lonely))


def test_an_infinite_value_makes_a_bound_infinite_and_none_nan():
    assert bootstrap([-inf, 1.0, 2.0, 4.0])[0] == -inf
    low, high = bootstrap([-inf] + [1.0, 2.0] * 200)
    assert low == -inf and (high == -inf or 1 < high < 2)
    assert all(map(isnan, paired([-inf, 1.0], [-inf, 0.5])))


def test_sums_with_counts_have_the_interval_of_all_their_terms():
    """Documents of one length are as questions are; a long document counts as much as it is long."""
    values = some(9)
    assert bootstrap(values * 4, counts=[4] * 9, seed=3) == pytest.approx(bootstrap(values, seed=3), rel=1e-12)
    low, high = bootstrap([100.0, 0.0, 0.0], counts=[100, 1, 1])
    assert low == 0 and high == 1
    assert bootstrap([*values, 0.0], counts=[4] * 9 + [0]) == bootstrap(values, counts=[4] * 9)


def test_columns_have_the_intervals_that_each_has_by_itself():
    """Where all questions have terms: as many draws, though others; so to about a hundredth of the width."""
    counts = np.stack([np.ones(80), np.full(80, 4.0), np.arange(80) % 3 + 1.0], axis=1)
    sums = np.stack([some(80), 4 * some(80), some(80, seed=1) * counts[:, 2]], axis=1)
    found = bootstrap_columns(sums, counts)
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    for each, column, terms in zip(found, sums.T, counts.T, strict=True):
        expected = bootstrap(column, counts=terms)
        assert each == pytest.approx(expected, abs=0.03 * (expected.high - expected.low))


def test_questions_without_terms_leave_a_columns_mean_alone_and_one_question_says_nothing():
    kind = np.arange(200) % 4 == 0
    sums = np.stack([np.where(kind, some(200), 0.0), np.arange(200) == 5, np.zeros(200)], axis=1)
    counts = np.stack([kind, np.arange(200) == 5, np.zeros(200)], axis=1)
    several, one, none = bootstrap_columns(sums, counts)
    expected = bootstrap(some(200)[kind])
    assert several == pytest.approx(expected, abs=0.1 * (expected.high - expected.low))
    assert all(map(isnan, (*one, *none)))
    with pytest.raises(ValueError, match=r"sums have shape \(3,\) and counts \(3,\), but they must be \[n, c\]"):
        bootstrap_columns([1.0, 2.0, 3.0], [1, 1, 1])


def test_a_paired_interval_is_that_of_the_differences():
    hard = some(50) * 10
    better = hard + some(50, seed=1) * 0.01
    assert paired(better, hard, seed=2) == bootstrap(better - hard, seed=2)
    assert paired(better, hard).low > 0 > bootstrap(better).low - bootstrap(hard).high


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="values are 2 and reference 3, but they must be paired"):
        paired([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="right are 1 and reference 2"):
        changes([True], [True, False])
    with pytest.raises(ValueError, match="values are empty"):
        bootstrap([])
    with pytest.raises(ValueError, match=r"values have shape \(2,\) and counts \(1,\)"):
        bootstrap([1.0, 2.0], counts=[1])


def test_repaired_and_broken_answers_are_counted():
    assert changes([True, True, False, True], [False, True, True, False]) == Changes(repaired=2, broken=1)


@pytest.mark.parametrize("repaired, broken", [(0, 0), (1, 0), (5, 2), (2, 5), (3, 3), (9, 1)])
def test_mcnemars_p_value_counts_the_coins_that_are_as_lopsided(repaired, broken):
    flips = [sum(coins) for coins in product((0, 1), repeat=repaired + broken)]
    lopsided = abs(repaired - broken)
    expected = sum(abs(2 * heads - repaired - broken) >= lopsided for heads in flips) / len(flips)
    assert Changes(repaired, broken).p_value == pytest.approx(expected, rel=1e-12)


def test_mcnemars_p_value_of_many_changes_is_exact():
    """As ``scipy.stats.binomtest(4900, 10000)`` says it, though 2^10000 is beyond a float."""
    assert Changes(4900, 5100).p_value == pytest.approx(0.046585527704946, rel=1e-12)
