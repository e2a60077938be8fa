"""Where the curves of a chart lie."""

from __future__ import annotations

import itertools

import pytest

from qstar.inspection.line_charts import BOTTOM, LABEL, LEFT, RIGHT, TOP, Line, line_chart


def spots(text: str) -> list[tuple[float, float]]:
    return [tuple(map(float, each.split(","))) for each in text.split()]


def test_values_lie_where_the_scale_has_them():
    values = [-0.1, 0.4, 0.25]
    band = dict(low=[None, 0.3, 0.2], high=[None, 0.5, 0.3])
    chart = line_chart("gain", [0, 50, 200], [Line("own", values, **band), Line("pause", [0.0, 0.1, -0.05])])
    own, pause = chart["lines"]
    assert [x for x, _ in spots(own["points"])] == [LEFT, pytest.approx((3 * LEFT + RIGHT) / 4), RIGHT]
    heights = [y for _, y in spots(own["points"])]
    scale = (BOTTOM - TOP) / 0.6  # from the least, -0.1, to the upper end of the band, 0.5

    def height(value: float) -> float:
        return pytest.approx(BOTTOM - (value + 0.1) * scale, abs=0.06)

    assert heights == [height(value) for value in values]
    assert own["dots"] == spots(own["points"])
    outline = [(RIGHT, 0.2), (own["dots"][1][0], 0.3)]
    upper = [(own["dots"][1][0], 0.5), (RIGHT, 0.3)]
    assert spots(own["band"]) == [(x, height(y)) for x, y in upper + outline]
    assert pause["band"] == "" and chart["zero"] == height(0)
    assert [float(name) for _, name in chart["ticks"]] == [0, 0.2, 0.4]
    assert [place for place, _ in chart["ticks"]] == [height(value) for value in (0, 0.2, 0.4)]
    assert (chart["places"], chart["steps"]) == ([x for x, _ in own["dots"]], (0, 200))
    assert (own["last"], pause["last"]) == ("0.250", "-0.050")
    assert own["dash"] != pause["dash"], "colour is not the only sign"


def test_names_of_curves_that_end_at_one_place_are_apart():
    chart = line_chart("gain", [0, 1], [Line(name, [0.0, end]) for name, end in (("a", 0.5), ("b", 0.5), ("c", 0.499))])
    ends = sorted(line["end"] for line in chart["lines"])
    gone = line_chart("gain", [0, 1], [Line("a", [0.3, 0.0]), *(Line(name, [0.0, 0.0]) for name in "bcd")])
    places = sorted(line["end"] for line in gone["lines"])
    assert places == [BOTTOM + LABEL - LABEL * number for number in (3, 2, 1, 0)], "inside of the picture"
    assert all(after - before >= LABEL for before, after in itertools.pairwise(ends))
    assert chart["named"] and not line_chart("one", [0], [Line("", [1.0])])["named"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 0.0], [0, 0.5]),
        ([0.0, 3e-7], [0, 1e-7, 2e-7, 3e-7]),
        ([0.0, 40.0], [0, 20, 40]),
        ([-2.0, 0.0], [-2, -1, 0]),
        ([0.7, 0.71], [0, 0.5]),
        ([0.0, 0.3], [0, 0.1, 0.2, 0.3]),
        ([-0.3, 0.3], [-0.2, 0, 0.2]),
    ],
    ids=str,
)
def test_ticks_are_round_and_hold_zero(values, ticks):
    assert [float(name) for _, name in line_chart("", [0, 1], [Line("", values)])["ticks"]] == ticks


def test_one_step_is_a_point():
    [line] = line_chart("gain", [7], [Line("own", [0.5], low=[0.4], high=[0.6])])["lines"]
    assert line["dots"] == [(LEFT, pytest.approx(BOTTOM - (BOTTOM - TOP) * 0.5 / 0.6, abs=0.06))]
