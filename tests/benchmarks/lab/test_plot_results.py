"""The figures of the benchmarks: every contender is drawn where it was measured, also one that nobody told them of."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from lab import plot_results, plot_style

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def measured(benchmark: str) -> dict:
    return json.loads((BENCHMARKS / "results" / f"{benchmark}-amd-epyc.json").read_text())


def steps() -> dict:
    ours = {"fraction_of_bound": 0.4, "text_tokens_per_s": 1000.0}
    case = {
        "model": "1B",
        "positions": 256,
        "batch": 4,
        "checkpointing": True,
        "contenders": {"ours": ours, "ours_new": {"fraction_of_bound": 0.5, "text_tokens_per_s": 1200.0}},
        "phases_ms": {"think": 60.0, "backward": 40.0},
    }
    other = case | {"model": "7B", "contenders": {"ours": ours}, "phases_ms": {"think": 30.0, "backward": 10.0}}
    return measured("lm_head") | {"benchmark": "llama_step", "cases": [case, other]}


def test_styles_of_unknown_contenders_differ():
    styles = plot_style.styles_of(["a_new", "flex", "ours", "b_new", "a_new", *(f"c{number}" for number in range(9))])
    assert list(styles)[:4] == ["ours", "flex", "a_new", "b_new"] and len(styles) == 13
    assert styles["a_new"].label == "a new"
    looks = [(style.colour, style.marker) for style in styles.values()]
    assert len(set(looks)) == len(looks)


def test_styles_of_the_committed_results_differ():
    for benchmark in ("thought_attention", "lm_head"):
        cases = measured(benchmark)["cases"]
        names = {name for case in cases for name in (*case["contenders"], *case["absent"])}
        looks = [(style.colour, style.marker) for style in plot_style.styles_of(names).values()]
        assert len(set(looks)) == len(looks)


def test_points_of_a_row_do_not_hide_each_other():
    cases = [
        {"contenders": {"products": {"ms": 1.0}, "new": {"ms": 1.0}, "ours": {"ms": 1.0}}},
        {"contenders": {name: {"ms": 2.0} for name in "abcdefgh"}},
    ]
    rows = plot_style.Rows(cases)
    assert rows.edges == pytest.approx([0.0, 3.6, 12.2])
    points = {name: rows.points(name, lambda own: own.get("ms")) for name in ("ours", "products", "new", "a", "h")}
    assert {name: values for name, (values, _) in points.items()} == dict(ours=[1], products=[1], new=[1], a=[2], h=[2])
    heights = [heights[0] for _, heights in points.values()]
    assert heights == pytest.approx([0.8, 1.8, 2.8, 4.4, 11.4])
    assert rows.points("ours", lambda own: own.get("not measured")) == ([], [])


@pytest.mark.parametrize("number, text", [(0.12345, "0.123"), (12.345, "12.3"), (123.4, "123"), (12345.6, "12346")])
def test_plainly_writes_three_digits_or_those_before_the_point(number, text):
    assert plot_style.plainly(number) == text


def test_read_all_takes_the_results_of_a_folder_and_refuses_another_file(tmp_path):
    for name, content in (("a", steps()), ("summary", {"stages": {}}), ("tiles-lm_head", {"sm_90": {}})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert list(plot_results.read_all([tmp_path])) == [tmp_path / "a.json"]
    with pytest.raises(
        SystemExit, match=r"summary\.json does not hold the results of one of thought_attention, lm_head"
    ):
        plot_results.read_all([tmp_path / "a.json", tmp_path / "summary.json"])


# With matplotlib


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    yield import_module("matplotlib.pyplot")
    import_module("matplotlib.pyplot").close("all")


def lines(axes) -> dict[str, list[float]]:
    """Values of what has a label, along the axis of the measurement."""
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_draw_attention_against_positions(pyplot):
    results = measured("thought_attention")
    cases = [case for case in results["cases"] if case["pass"] == "forward"]
    for case in cases[1:3]:
        case["contenders"]["brand_new"] = {"ms": 7.0}
    figure = plot_results.draw_attention(pyplot, results)
    drawn = lines(figure.axes[0])
    assert set(drawn) == {"ours", "SDPA flash + own block", "dense, masked", "brand new", "bound of the device"}
    assert [*drawn["brand new"].get_xdata()] == [256, 512] and [*drawn["brand new"].get_ydata()] == [7.0, 7.0]
    assert [*drawn["ours"].get_ydata()] == [case["contenders"]["ours"]["ms"] for case in cases]
    assert "brand new" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_draw_the_head_in_three_panels(pyplot):
    results = measured("lm_head")
    results["cases"][0]["contenders"]["brand_new"] = {"ms": 7.0, "times_products": 2.0, "extra_mib": -1.0}
    figure = plot_results.draw_head(pyplot, results)
    times, ratios, memory = (lines(axes) for axes in figure.axes)
    assert [*times["brand new"].get_xdata()] == [7.0] and [*ratios["brand new"].get_xdata()] == [2.0]
    assert [*memory["brand new"].get_xdata()] == [0.0]
    contenders = [case["contenders"] for case in results["cases"]]
    assert [*times["products alone"].get_xdata()] == [x["products"]["ms"] for x in contenders if "products" in x]
    assert "products alone" not in ratios and "products alone" not in memory
    ratio = [x["ours"]["times_products"] for x in contenders if "products" in x]
    assert [*ratios["ours"].get_xdata()] == ratio
    written = [text.get_text() for text in figure.axes[1].texts]
    assert written == [f"{x:.3g}" for x in ratio]


def test_draw_a_training_step_in_its_phases(pyplot):
    figure = plot_results.draw_step(pyplot, steps())
    widths = [[round(bar.get_width()) for bar in bars] for bars in figure.axes[0].containers]
    assert widths == [[60, 75], [40, 25]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["60", "30", "40", "10"]
    bound, speed = (lines(axes) for axes in figure.axes[1:])
    assert [*bound["ours"].get_xdata()] == [40.0, 40.0] and [*bound["ours new"].get_xdata()] == [50.0]
    assert [*speed["ours new"].get_xdata()] == [1200.0]


def test_draw_how_a_step_grows(pyplot):
    def case(varied: str, value: int, *ms: float) -> dict:
        contenders = dict(zip(("masked", "torch", "ours"), ({"ms": each} for each in ms), strict=True))
        return {"varied": varied, "value": value, "contenders": contenders}

    cases = [case("positions", 64, 900.0, 500.0, 300.0), case("positions", 128, 2000.0, 900.0, 600.0)]
    cases += [case("thought_tokens", 4, 700.0, 400.0, 250.0)]
    results = {
        "benchmark": "training_step",
        "device": {"name": "some CPU"},
        "versions": {"torch": "2"},
        "date": "2000-01-01",
        "usual": {"positions": 128, "thought_tokens": 9},
        "cases": cases,
    }
    figure = plot_results.draw_growth(pyplot, results)
    by_length, by_tokens = (lines(axes) for axes in figure.axes)
    assert [*by_length["ours"].get_xdata()] == [64, 128] and [*by_length["ours"].get_ydata()] == [0.3, 0.6]
    assert [*by_length["the masked path"].get_ydata()] == [0.9, 2.0]
    assert [*by_tokens["ours, torch's own products"].get_ydata()] == [0.4]
    assert "N = 128, K = 9 where they do not change" in figure.get_suptitle()


def test_the_same_results_give_the_same_file(pyplot, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        plot_results.draw(steps(), tmp_path / folder / "step.svg")
    one, two = ((tmp_path / folder / "step.svg").read_bytes() for folder in ("one", "two"))
    assert one == two and b"<svg" in one
