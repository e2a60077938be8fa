"""The scale of gains, the best and worst thoughts and histograms, against what a reader would count."""

from __future__ import annotations

import pytest
import tiny

import qstar
from qstar.inspection.highlights import LEVELS, WEIGHTS, bin_names, extremes, histogram, level, level_name, places


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0, 0),
        (0.049, 0),
        (0.05, 1),
        (-0.05, -1),
        (0.3, 2),
        (-0.31, -2),
        (0.99, 2),
        (1, 3),
        (-1, -3),
        (40, 3),
        (-40, -3),
    ],
)
def test_a_level_begins_at_its_bound_on_both_sides(gain, expected):
    assert level(gain) == expected


def test_levels_have_names_that_say_their_gains():
    assert [level_name(step) for step in LEVELS] == [
        "-1 and less",
        "-0.3 to -1",
        "-0.05 to -0.3",
        "-0.05 to +0.05",
        "+0.05 to +0.3",
        "+0.3 to +1",
        "+1 and more",
    ]


def test_the_best_and_worst_thoughts_are_those_of_the_largest_gains_and_losses():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    found = qstar.inspect(model, tiny.tokenizer(), ["a b c d e f", "g h i j k l m"], controls=False)
    gains = sorted(each.gain for document in found.documents for each in document.positions)
    best, worst = extremes(found, 3)
    assert [each.position.gain for each in worst] == gains[:3]
    assert [each.position.gain for each in best] == [gain for gain in gains[::-1] if gain > 0][:3]
    for each in (*best, *worst):
        assert each.document is found.documents[each.number]
        assert any(each.position is position for position in each.document.positions)
    assert extremes(found, 0) == ([], [])
    everything = extremes(found, 100)
    assert len(everything[0]) + len(everything[1]) == len(places(found)) == len(gains)


def test_what_gained_nothing_is_neither_best_nor_worst():
    model = tiny.thinking_model("llama", mixing=False, thought_tokens=2, ahead_tokens=2)
    assert extremes(qstar.inspect(model, tiny.tokenizer(), "a b c", controls=False), 5) == ([], [])


def test_a_histogram_counts_each_value_once_and_a_bound_in_the_bin_above():
    assert histogram([-1, 0, 0.05, 0.1, 0.99, 1, 3], (0, 0.1, 1)) == [1, 2, 2, 2]
    assert histogram([], (0, 1)) == [0, 0, 0]
    assert bin_names((0, 0.1, 1)) == ["below 0", "0 to 0.1", "0.1 to 1", "1 and more"]
    assert len(bin_names(WEIGHTS)) == len(histogram([], WEIGHTS)) == 12
