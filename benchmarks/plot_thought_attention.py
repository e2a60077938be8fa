"""Draw what bench_thought_attention.py measured: time against N, every contender a line, and the bound.

python benchmarks/plot_thought_attention.py benchmarks/results/thought_attention-*.json [--format png] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

try:
    from matplotlib import pyplot
except ImportError as error:
    raise SystemExit("the plot needs matplotlib: pip install matplotlib") from error

STYLES = {  # name in the results: label, colour, marker; colours that the colour-blind can tell apart
    "ours": ("ours", "#d55e00", "o"),
    "ours_torch": ("ours, backend torch", "#e69f00", "s"),
    "sdpa_cudnn": ("cuDNN + own block", "#009e73", "^"),
    "sdpa_flash": ("SDPA flash + own block", "#56b4e9", "v"),
    "flash_attention_3": ("FlashAttention 3 + own block", "#0072b2", "<"),
    "flash_attention_4": ("FlashAttention 4 + own block", "#999999", ">"),
    "flex": ("FlexAttention", "#cc79a7", "D"),
    "dense_masked": ("dense, masked", "#000000", "x"),
}


def sweep(cases: list[dict]) -> list[dict]:
    """The cases of the T and D that were measured at the most N, in the order of N."""
    shapes = Counter((case["tokens"], case["width"]) for case in cases if case["pass"] == "forward")
    if not shapes:
        raise SystemExit("no forward pass was measured")
    shape = shapes.most_common(1)[0][0]
    return sorted(
        (case for case in cases if (case["tokens"], case["width"]) == shape), key=lambda case: case["positions"]
    )


def draw_panel(axes, title: str, cases: list[dict]) -> None:
    for name, (label, colour, marker) in STYLES.items():
        measured = [(case["positions"], case["contenders"].get(name)) for case in cases]
        points = [(positions, own["ms"]) for positions, own in measured if own]
        if points:
            width = 2.4 if name == "ours" else 1.4
            axes.plot(
                *zip(*points, strict=True), label=label, color=colour, marker=marker, markersize=5, linewidth=width
            )
    positions = [case["positions"] for case in cases]
    bound = [case["bound_ms"] for case in cases]
    axes.plot(positions, bound, label="bound of the device", color="#777777", linestyle="--", marker="_")
    axes.set(title=title, xscale="log", yscale="log", xlabel="N, text positions (B, sequences)")
    axes.set_xticks(positions, [f"{case['positions']}\n({case['batch']})" for case in cases])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)


def draw(results: dict, path: Path) -> None:
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
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        draw_panel(axes, title, [case for case in cases if case["pass"] == name])
    panels[0].set_ylabel("ms")
    limits, versions = results["limits"], results["versions"]
    figure.suptitle(
        f"Thought attention on {results['device']['name']}: T = {shape['tokens']}, D = {shape['width']}, "
        f"{shape['heads']} query and {shape['kv_heads']} key/value heads, {shape['dtype']}\n"
        f"{limits['matrix_tflop_per_s']:.3g} TFLOP/s and {limits['copy_gb_per_s']:.4g} GB/s measured, "
        f"torch {versions['torch']}, triton {versions['triton']}, {results['date'][:10]}",
        fontsize=10,
    )
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(5, 2 * len(panels)),
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the results of bench_thought_attention.py, a figure each.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    parser.add_argument("--out", type=Path, help="folder of the figures, by default that of the results")
    options = parser.parse_args()
    for source in options.results:
        path = (options.out or source.parent) / f"{source.stem}.{options.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(json.loads(source.read_text()), path)
        print(path)


if __name__ == "__main__":
    main()
