"""What the results of the benchmarks say of the goals in docs/performance.md: a row for each figure, met or not.

The goals are for one H200. On another card the rows are the same, and its own bounds say what there is to reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

SHAPE = {"positions": 1024, "tokens": 16, "width": 128, "batch": 8, "heads": 32, "kv_heads": 8}
FORWARD, BACKWARD = 450.0, 300.0  # useful TFLOP/s
STEP = 0.7  # of its bound
TIMES_PRODUCTS = 1.15  # what the head may take, beside its bare products
THINKING = "trained to think, with its thoughts"
SPREAD = {"accuracy": (0.998, 1.0), "log_likelihood": (-0.697, -0.536)}  # of five seeds, on a CPU


class Row(NamedTuple):
    """A figure, and what it should be: ``met`` is None where there is no goal or it was not measured."""

    what: str
    goal: str
    measured: float | None
    met: bool | None


def at_least(what: str, goal: float, unit: str, measured: float | None) -> Row:
    return Row(what, f"at least {goal:g}{unit}", measured, None if measured is None else measured >= goal)


def at_most(what: str, goal: float, unit: str, measured: float | None) -> Row:
    return Row(what, f"at most {goal:g}{unit}", measured, None if measured is None else measured <= goal)


def is_ours(name: str) -> bool:
    return name == "ours" or name.startswith("ours_")


def best_other(record: dict) -> tuple[str, float] | None:
    """The fastest contender that is not one of ours, and its time over ours."""
    others = {name: own["times_ours"] for name, own in record["contenders"].items() if not is_ours(name)}
    return min(others.items(), key=lambda item: item[1]) if others else None


def backward_speed(forward: dict, both: dict, name: str) -> float | None:
    """Useful TFLOP/s of the backward alone: what forward and backward take together, less the forward."""
    one, two = (record["contenders"].get(name) for record in (forward, both))
    if one is None or two is None or two["ms"] <= one["ms"]:
        return None
    return (both["useful_gflop"] - forward["useful_gflop"]) / (two["ms"] - one["ms"])


def attention_rows(results: dict | None) -> Iterator[Row]:
    """Of every contender of ours at the shape of the goals; ``ours`` is there even where it was not measured."""
    cases = results["cases"] if results else []
    found = {case["pass"]: case for case in cases if all(case[name] == value for name, value in SHAPE.items())}
    forward, both = found.get("forward"), found.get("forward + backward")
    steps = {name: case for name, case in found.items() if name.startswith("step ")}
    names = (name for case in found.values() for name in case["contenders"] if is_ours(name))
    for name in dict.fromkeys(["ours", *names]):
        mine = forward["contenders"].get(name) if forward else None
        speed = backward_speed(forward, both, name) if forward and both else None
        if mine or name == "ours":
            yield at_least(f"{name}: forward", FORWARD, " TFLOP/s", mine and mine["useful_tflop_per_s"])
        if speed or name == "ours":
            yield at_least(f"{name}: backward", BACKWARD, " TFLOP/s", speed)
        for label, case in steps.items():
            if name in case["contenders"]:
                share = case["contenders"][name]["fraction_of_bound"]
                yield at_least(f"{name}: {label}, of its bound", STEP, "", share)
    if not steps:
        yield at_least("ours: step, of its bound", STEP, "", None)
    for label in ("forward", "forward + backward", *steps):
        other = best_other(found[label]) if label in found else None
        yield at_least(f"{label}: {other[0] if other else 'best other'} over ours", 1.0, " x", other and other[1])


def head_rows(results: dict | None) -> Iterator[Row]:
    """Every likelihood and draw that was measured, over its bare products."""
    cases = [case for case in results["cases"] if case["vocabulary"]] if results else []
    for case in cases:
        what = f"{case['pass']}: N {case['rows']}, E {case['width']}, V {case['vocabulary']}, over the products"
        yield at_most(what, case["goal_times_products"], " x", case["contenders"]["ours"].get("times_products"))
    if not cases:
        yield at_most("likelihood and draws, over the products", TIMES_PRODUCTS, " x", None)


def step_rows(results: dict | None) -> Iterator[Row]:
    """Whole training steps have no goal of their own."""
    for case in results["cases"] if results else []:
        ours, other = case["contenders"]["ours"], best_other(case)
        label = f"{case['model']}, N {case['positions']}, B {case['batch']}"
        yield Row(f"training step: {label}, of its bound", "", ours["fraction_of_bound"], None)
        yield Row(f"training step: {label}, text tokens/s", "", ours["text_tokens_per_s"], None)
        if other:
            yield Row(f"training step: {label}, {other[0]} over ours", "", other[1], None)


def embedded_rows(scores: dict[str, dict[str, float]] | None) -> Iterator[Row]:
    """What the embedded default has learned, beside the spread of seeds; better than that is no fault."""
    for name, (least, most) in SPREAD.items():
        measured = scores[THINKING][name] if scores else None
        what = f"embedded default, {name.replace('_', '-')} with its thoughts"
        yield Row(what, f"{least:g} to {most:g} on a CPU", measured, None if measured is None else measured >= least)


ROWS: dict[str, Callable[[dict | None], Iterator[Row]]] = {  # by the name of the benchmark
    "thought_attention": attention_rows,
    "lm_head": head_rows,
    "llama_step": step_rows,
}


def rows_of(results: dict[str, dict]) -> list[Row]:
    """Of results by the name of their benchmark; goals of what was not measured are listed without a figure."""
    return [row for benchmark, rows in ROWS.items() for row in rows(results.get(benchmark))]
