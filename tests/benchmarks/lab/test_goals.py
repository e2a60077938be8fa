"""Figures beside their goals: which are met, which were not measured, and which have none."""

from lab import goals


def contender(ms, times_ours=1.0, **figures):
    return {"ms": ms, "times_ours": times_ours, **figures}


def attention_case(name, gflop, contenders, **changes):
    return {**goals.SHAPE, "pass": name, "useful_gflop": gflop, "contenders": contenders, **changes}


ATTENTION = {
    "benchmark": "thought_attention",
    "cases": [
        attention_case(
            "forward",
            1200.0,
            {
                "ours": contender(2.5, useful_tflop_per_s=480.0),
                "ours_torch": contender(12.0, 4.8, useful_tflop_per_s=100.0),
                "ours_new": contender(2.0, 0.8, useful_tflop_per_s=600.0),
                "flex": contender(5.0, 2.0),
                "sdpa_cudnn": contender(4.0, 1.6),
            },
        ),
        attention_case(
            "forward + backward",
            4200.0,
            {"ours": contender(14.5), "ours_new": contender(10.0), "flex": contender(13.0, 0.9)},
        ),
        attention_case("step 16", 70.0, {"ours": contender(0.3, fraction_of_bound=0.65)}),
        attention_case("forward", 1.0, {"ours": contender(9.9, useful_tflop_per_s=1.0)}, positions=256),
    ],
}


def test_attention_rows_take_the_shape_of_the_goals_and_every_contender_of_ours():
    rows = {row.what: row for row in goals.attention_rows(ATTENTION)}
    assert {what: (row.measured, row.met) for what, row in rows.items()} == {
        "ours: forward": (480.0, True),
        "ours: backward": (250.0, False),  # 3000 GFLOP in 12 ms
        "ours: step 16, of its bound": (0.65, False),
        "ours_torch: forward": (100.0, False),
        "ours_new: forward": (600.0, True),
        "ours_new: backward": (375.0, True),
        "forward: sdpa_cudnn over ours": (1.6, True),
        "forward + backward: flex over ours": (0.9, False),
        "step 16: best other over ours": (None, None),
    }
    assert rows["ours: forward"].goal == "at least 450 TFLOP/s"


def head_case(kind, times_products):
    contenders = {"ours": contender(1.0), "products": contender(0.8, 0.8)}
    if times_products:
        contenders["ours"]["times_products"] = times_products
    size = {"rows": 32768, "width": 4096, "vocabulary": 128256 if times_products else 0}
    return {"pass": kind, **size, "goal_times_products": 1.15, "contenders": contenders}


def test_head_rows_have_a_goal_and_training_steps_none():
    head = {"cases": [head_case("likelihood", 1.1), head_case("sample", 1.2), head_case("mix", None)]}
    assert [(row.measured, row.met) for row in goals.head_rows(head)] == [(1.1, True), (1.2, False)]
    contenders = {
        "ours": contender(100.0, fraction_of_bound=0.4, text_tokens_per_s=1e4),
        "ours_graph": contender(90.0, 0.9, fraction_of_bound=0.45, text_tokens_per_s=1.1e4),
        "step_by_step": contender(300.0, 3.0, fraction_of_bound=0.13, text_tokens_per_s=3e3),
    }
    step = {"cases": [{"model": "1B", "positions": 256, "batch": 4, "contenders": contenders}]}
    rows = list(goals.step_rows(step))
    assert [row.measured for row in rows] == [0.4, 1e4, 3.0] and {row.met for row in rows} == {None}


def test_embedded_rows_are_met_at_the_least_of_other_seeds_or_above():
    scores = {goals.THINKING: {"accuracy": 0.98, "log_likelihood": -0.3}}
    assert [(row.measured, row.met) for row in goals.embedded_rows(scores)] == [(0.98, False), (-0.3, True)]


def test_goals_of_what_was_not_measured_have_no_figure():
    rows = [*goals.rows_of({}), *goals.embedded_rows(None)]
    assert len(rows) == 8 and all(row.measured is None and row.met is None for row in rows)
