"""Draw what the benchmarks measured, a figure for each results file.

python -m lab.plot_results results [--format png] [--out FOLDER]

- thought_attention: time against N, every contender a line, and the bound;
- lm_head: time, its ratio to the bare products, and the memory that a call takes beyond its inputs and results;
- llama_step: what a training step is made of, its share of the bound, and text tokens a second;
- training_step: time of a small step on a CPU against N, r, K and m.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from lab.plot_style import Rows, Style, add_legend, contenders_of, head_line, logarithmic, plainly, styles_of

PHASE_COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#999999", "#009e73")
DARK = {"#0072b2", "#d55e00"}  # on which writing is white
POINT_INCHES = 0.14  # of a contender in a row


# Thought attention


def sweep(cases: list[dict]) -> list[dict]:
    """The cases of the T and D that were measured at the most N, in the order of N."""
    shapes = Counter((case["tokens"], case["width"]) for case in cases if case["pass"] == "forward")
    if not shapes:
        raise SystemExit("no forward pass was measured")
    shape = shapes.most_common(1)[0][0]
    return sorted(
        (case for case in cases if (case["tokens"], case["width"]) == shape), key=lambda case: case["positions"]
    )


def draw_line(axes, cases: list[dict], name: str, style: Style) -> None:
    measured = [(case["positions"], case["contenders"].get(name)) for case in cases]
    points = [(positions, own["ms"]) for positions, own in measured if own]
    if points:
        look = dict(label=style.label, color=style.colour, marker=style.marker, linestyle=style.line)
        axes.plot(*zip(*points, strict=True), **look, markersize=5, linewidth=2.4 if name == "ours" else 1.4)


def draw_panel(axes, title: str, cases: list[dict], styles: dict[str, Style]) -> None:
    for name, style in styles.items():
        draw_line(axes, cases, name, style)
    positions = [case["positions"] for case in cases]
    bound = [case["bound_ms"] for case in cases]
    axes.plot(positions, bound, label="bound of the device", color="#777777", linestyle=":", marker="_")
    axes.set(title=title, xscale="log", yscale="log", xlabel="N, text positions (B, sequences)")
    axes.set_xticks(positions, [f"{case['positions']}\n({case['batch']})" for case in cases])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)


def draw_attention(pyplot, results: dict):
    cases = sweep(results["cases"])
    shape = cases[0]
    tokens = shape["tokens"]
    titles = {name: name for name in ("forward", "forward + backward")} | {
        f"step {tokens}": f"one step, token {tokens} of {tokens}"
    }
    titles = {name: title for name, title in titles.items() if any(case["pass"] == name for case in cases)}
    figure, [panels] = pyplot.subplots(
        1, len(titles), figsize=(4 * len(titles), 4.6), layout="constrained", squeeze=False
    )
    styles = styles_of(contenders_of(cases))
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        draw_panel(axes, title, [case for case in cases if case["pass"] == name], styles)
    panels[0].set_ylabel("ms")
    what = (
        f"Thought attention: T = {shape['tokens']}, D = {shape['width']}, "
        f"{shape['heads']} query and {shape['kv_heads']} key/value heads, {shape['dtype']}"
    )
    figure.suptitle(head_line(what, results), fontsize=10)
    add_legend(figure, panels, columns=min(5, 2 * len(panels)))
    return figure


# The language-model head

PASSES = {"likelihood": "likelihood", "half_the_rows": "half the rows", "sample": "draws", "mix": "mixing"}


def row_panels(pyplot, rows: Rows, labels: list[str]):
    """Three panels that share their rows."""
    size = 12, 1.7 + rows.edges[-1] * POINT_INCHES
    figure, panels = pyplot.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
    panels[0].set_yticks(rows.middles, labels, fontsize=9)
    return figure, panels


def head_label(case: dict) -> str:
    size = f"N {case['rows']}, E {case['width']}"
    name = PASSES.get(case["pass"], case["pass"])
    return f"{name}\n{size}" + (f"\nV {case['vocabulary']}" if case["vocabulary"] else "")


def extra_mib(own: dict) -> float | None:
    """None for the bare products; a call may hold less than its results, where those are made narrower."""
    return max(own["extra_mib"], 0.0) if "extra_mib" in own else None


def draw_head(pyplot, results: dict):
    cases = results["cases"]
    rows, styles = Rows(cases), styles_of(contenders_of(cases))
    figure, panels = row_panels(pyplot, rows, [head_label(case) for case in cases])
    others = {name: style for name, style in styles.items() if name != "products"}
    rows.draw(panels[0], styles, "ms", lambda own: own["ms"])
    rows.draw(panels[1], others, "times the bare products", lambda own: own.get("times_products"))
    rows.draw(panels[2], others, "MiB beyond inputs and results", extra_mib)
    goal = cases[0]["goal_times_products"]
    panels[1].axvline(1.0, color="#555555", linewidth=1.2)
    panels[1].axvline(goal, color="#009e73", linestyle="--", linewidth=1.2, label=f"the goal on a GPU, {goal:g}")
    for axes in panels:
        logarithmic(axes, from_zero=axes is panels[2])
    what = f"The language-model head, {cases[0]['dtype']}"
    figure.suptitle(head_line(what, results), fontsize=10)
    add_legend(figure, panels, columns=5)
    return figure


# Training steps


def step_label(case: dict) -> str:
    extra = "\ncheckpointing" if case["checkpointing"] and "checkpoint" not in case["model"] else ""
    return f"{case['model']}\nN {case['positions']}, B {case['batch']}{extra}"


def draw_phases(axes, rows: Rows) -> None:
    """Shares of a step of ours, the milliseconds written in them where there is room."""
    phases = [case["phases_ms"] for case in rows.cases]
    left = [0.0] * len(phases)
    for name, colour in zip(dict.fromkeys(name for each in phases for name in each), cycle(PHASE_COLOURS)):
        times = [each.get(name, 0.0) for each in phases]
        shares = [100 * time / sum(each.values()) for time, each in zip(times, phases, strict=True)]
        axes.barh(rows.middles, shares, 2.2, left, color=colour, edgecolor="white", label=name)
        for start, middle, time, share in zip(left, rows.middles, times, shares, strict=True):
            if share > 7:
                look = dict(ha="center", va="center", fontsize=8, color="white" if colour in DARK else "black")
                axes.text(start + share / 2, middle, plainly(time), **look)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    rows.prepare(axes, "phases of a step of ours, % (written in: ms)")
    axes.set_xlim(0, 100)


def draw_step(pyplot, results: dict):
    cases = results["cases"]
    rows, styles = Rows(cases), styles_of(contenders_of(cases))
    figure, panels = row_panels(pyplot, rows, [step_label(case) for case in cases])
    draw_phases(panels[0], rows)
    share = "% of the bound (the device's matrix rate)"
    rows.draw(panels[1], styles, share, lambda own: 100 * own["fraction_of_bound"])
    rows.draw(panels[2], styles, "text tokens/s", lambda own: own.get("text_tokens_per_s"))
    panels[1].set_xlim(0, 1.2 * panels[1].dataLim.xmax)
    logarithmic(panels[2])
    what = "Training steps with two rationales of 8 sampled tokens scored on 4, optimizer included"
    figure.suptitle(head_line(what, results), fontsize=10)
    add_legend(figure, panels, columns=8)
    return figure


# A small training step on a CPU

AXES = {
    "positions": "N, text positions",
    "rationales": "r, thoughts at a position",
    "thought_tokens": "K, tokens in a thought",
    "ahead_tokens": "m, tokens that it is scored on",
}


def draw_growth(pyplot, results: dict):
    cases = results["cases"]
    names = [name for name in AXES if any(case["varied"] == name for case in cases)]
    size = 3.2 * len(names), 4
    figure, [panels] = pyplot.subplots(1, len(names), figsize=size, layout="constrained", sharey=True, squeeze=False)
    styles = styles_of(contenders_of(cases))
    for axes, name in zip(panels, names, strict=True):
        here = [case for case in cases if case["varied"] == name]
        values = [case["value"] for case in here]
        for contender, style in styles.items():
            look = dict(label=style.label, color=style.colour, marker=style.marker, linestyle=style.line)
            axes.plot(values, [case["contenders"][contender]["ms"] / 1e3 for case in here], **look, markersize=5)
        axes.set(xscale="log", yscale="log", xlabel=AXES[name])
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("seconds")
    usual = ", ".join(f"{AXES[name].split(',')[0]} = {value}" for name, value in results["usual"].items())
    device, versions = results["device"]["name"], results["versions"]
    title = f"A small training step, {usual} where they do not change\n{device}, torch {versions['torch']}"
    figure.suptitle(f"{title}, {results['date'][:10]}", fontsize=10)
    add_legend(figure, panels, columns=3)
    return figure


FIGURES: dict[str, Callable] = {  # by the name of the benchmark
    "thought_attention": draw_attention,
    "lm_head": draw_head,
    "llama_step": draw_step,
    "training_step": draw_growth,
}


def read_all(sources: list[Path]) -> dict[Path, dict]:
    """Results by their file; of a folder all that it holds."""
    found = {}
    for source in sources:
        for path in sorted(source.glob("*.json")) if source.is_dir() else [source]:
            results = json.loads(path.read_text())
            if results.get("benchmark") in FIGURES:
                found[path] = results
            elif not source.is_dir():
                raise SystemExit(f"{path} does not hold the results of one of {', '.join(FIGURES)}")
    return found


def draw(results: dict, path: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from error
    if not results["cases"]:
        raise SystemExit(f"nothing was measured for {path.name}")
    with pyplot.rc_context({"svg.hashsalt": path.stem}):  # the same results give the same file
        figure = FIGURES[results["benchmark"]](pyplot, results)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw results of the benchmarks, a figure each.")
    parser.add_argument("results", type=Path, nargs="+", help="files, or folders that hold some")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--out", type=Path, help="folder of the figures, by default that of the results")
    options = parser.parse_args()
    for source, results in read_all(options.results).items():
        path = (options.out or source.parent) / f"{source.stem}.{options.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(results, path)
        print(path)


if __name__ == "__main__":
    main()
