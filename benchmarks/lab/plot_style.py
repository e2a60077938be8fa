"""What the figures of lab/plot_results.py share: how each contender looks, the head line, the legend, rows of points.

Colours are those of Okabe and Ito, and Tol's for what is not known by name: the colour-blind can tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple


class Style(NamedTuple):
    """Of a contender; its ``order`` in legends and rows is that of the table below."""

    label: str
    colour: str
    marker: str
    line: str = "-"


STYLES = {  # by name in the results; contenders of different benchmarks never meet in a figure
    "ours": Style("ours", "#d55e00", "o"),
    "ours_torch": Style("ours, backend torch", "#e69f00", "s"),
    "ours_triton": Style("ours, plain Triton", "#e69f00", "d"),
    "ours_hopper": Style("ours, for Hopper", "#882255", "P"),
    "ours_two_passes": Style("ours, two passes", "#e69f00", "d"),
    "sdpa_cudnn": Style("cuDNN + own block", "#009e73", "^"),
    "sdpa_flash": Style("SDPA flash + own block", "#56b4e9", "v"),
    "flash_attention_3": Style("FlashAttention 3 + own block", "#0072b2", "<"),
    "flash_attention_4": Style("FlashAttention 4 + own block", "#999999", ">"),
    "flex": Style("FlexAttention", "#cc79a7", "D"),
    "dense_masked": Style("dense, masked", "#000000", "x"),
    "epilogue": Style("drawn inside the product", "#117733", "8"),
    "liger": Style("Liger", "#009e73", "^"),
    "liger_float32": Style("Liger, dW in float32", "#56b4e9", "v"),
    "liger_sm90": Style("Liger for Hopper", "#44aa99", "<"),
    "quack": Style("QuACK", "#f0e442", ">"),
    "torch_linear": Style("torch, linear cross entropy", "#0072b2", "D"),
    "torch_chunked": Style("the same in chunks", "#cc79a7", "p"),
    "logits": Style("all logits", "#000000", "x"),
    "multinomial": Style("all logits, multinomial", "#332288", "*"),
    "gumbel": Style("all logits, Gumbel noise", "#999999", "+"),
    "products": Style("products alone", "#555555", "|"),
    "masked": Style("the masked path", "#000000", "x"),
    "torch": Style("ours, torch's own products", "#e69f00", "s"),
    "step_by_step": Style("step by step, masked", "#000000", "x"),
}
OTHER_COLOURS = ("#882255", "#999933", "#aa4499", "#661100")
OTHER_MARKERS = ("P", "X", "h", "H", "*")
LABEL_LINES = 3.4  # of a row's label, in points: no row is lower


def styles_of(names: Iterable[str]) -> dict[str, Style]:
    """Those that the table knows in its order, then the others in theirs, each with a look of its own."""
    names = list(dict.fromkeys(names))
    others = {}
    for number, name in enumerate(name for name in names if name not in STYLES):
        look = (looks[number % len(looks)] for looks in (OTHER_COLOURS, OTHER_MARKERS))
        others[name] = Style(name.replace("_", " "), *look, "--")
    return {name: style for name, style in STYLES.items() if name in names} | others


def contenders_of(cases: Iterable[dict]) -> list[str]:
    return [name for case in cases for name in case["contenders"]]


def head_line(what: str, results: dict) -> str:
    """``what`` was measured, on which device, and when."""
    limits, versions = results["limits"], results["versions"]
    return (
        f"{what}\n{results['device']['name']}: "
        f"{limits['matrix_tflop_per_s']:.3g} TFLOP/s and {limits['copy_gb_per_s']:.4g} GB/s measured, "
        f"torch {versions['torch']}, triton {versions['triton']}, {results['date'][:10]}"
    )


def add_legend(figure, panels: Sequence, columns: int) -> None:
    """One for all panels, below them."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )


def plainly(number: float) -> str:
    """Three digits, or those before the point."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


class Rows:
    """A row for each case, as high as it has contenders; ``edges`` are those between and around them."""

    def __init__(self, cases: Sequence[dict]):
        self.cases = cases
        heights = [max(LABEL_LINES, len(case["contenders"]) + 0.6) for case in cases]
        self.edges = [0.0, *accumulate(heights)]
        self.middles = [(upper + lower) / 2 for upper, lower in pairwise(self.edges)]

    def points(self, name: str, value: Callable[[dict], float | None]) -> tuple[list[float], list[float]]:
        """Values of a contender where it was measured, and the heights at which they are drawn."""
        values, heights = [], []
        for middle, case in zip(self.middles, self.cases, strict=True):
            own = case["contenders"].get(name)
            found = value(own) if own else None
            if found is not None:
                there = list(styles_of(case["contenders"]))
                values.append(found)
                heights.append(middle + there.index(name) - (len(there) - 1) / 2)
        return values, heights

    def prepare(self, axes, title: str) -> None:
        """Rows of alternating shade, the first one above."""
        for upper, lower in list(pairwise(self.edges))[::2]:
            axes.axhspan(upper, lower, color="#f4f4f4", zorder=0)
        axes.set_ylim(self.edges[-1], 0)
        axes.tick_params(axis="y", length=0)
        axes.set_title(title, fontsize=10)
        axes.set_axisbelow(True)

    def draw(self, axes, styles: dict[str, Style], title: str, value: Callable[[dict], float | None]) -> None:
        """A point for each contender; the value is written beside ours."""
        self.prepare(axes, title)
        axes.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
        for name, style in styles.items():
            values, heights = self.points(name, value)
            size = 7 if name == "ours" else 5.5
            look: dict[str, Any] = dict(marker=style.marker, color=style.colour, linestyle="none", markersize=size)
            if values:
                axes.plot(values, heights, **look, markeredgewidth=1.4, label=style.label)
            for found, height in zip(values, heights, strict=True) if name == "ours" else ():
                place = dict(xytext=(6, 0), textcoords="offset points", va="center")
                axes.annotate(plainly(found), (found, height), **place, fontsize=8, color=style.colour)


def logarithmic(axes, *, from_zero: bool = False) -> None:
    """Few ticks, as plain numbers, and room for what is written beside a point; ``from_zero``: even below 1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.dataLim.intervalx
    if from_zero:
        axes.set_xscale("symlog", linthresh=1, linscale=0.3)
        axes.set_xlim(-0.3, max(10.0, high) ** 1.25)
    else:
        axes.set_xscale("log")
        room = max(high / low, 2.0)
        axes.set_xlim(low / room**0.06, high * room**0.16)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if room < 300 else (1.0,), numticks=12))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
