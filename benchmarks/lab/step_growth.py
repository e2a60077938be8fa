"""How a training step on a CPU grows with N, r, K and m: ours beside the masked path, as a table and for a figure.

    python -m lab.step_growth [--rounds 3] [--out FOLDER]

One size changes at a time, the others are those of ``bench_training_step.py`` at N = 128. The steps of a size are timed
in turn: the masked path, ours by PyTorch's own choice of a library for float32 products, which the masked path has as
well, and ours. ``python -m lab.plot_results`` draws the file that this writes.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from bench_training_step import AHEAD_TOKENS, RATIONALES, STEPS, THOUGHT_TOKENS, check_agreement, in_turn
from lab.device_limits import describe, device_name, slug, versions
from lab.results_file import RESULTS, write
from qstar_kernels import explain

POSITIONS = 128
SWEEPS = {  # by the name of a size: its letter, and its values
    "positions": ("N", (32, 64, 128, 256, 512)),
    "rationales": ("r", (1, 2, 4, 8)),
    "thought_tokens": ("K", (4, 9, 16, 32)),
    "ahead_tokens": ("m", (1, 2, 4, 8)),
}
USUAL = {
    "positions": POSITIONS,
    "rationales": RATIONALES,
    "thought_tokens": THOUGHT_TOKENS,
    "ahead_tokens": AHEAD_TOKENS,
}


def measure(name: str, value: int, rounds: int) -> dict:
    """Milliseconds of each step where size ``name`` is ``value``: the median, and how many times as long as ours."""
    sizes = USUAL | {name: value}
    turns = in_turn(sizes.pop("positions"), rounds, **sizes)
    contenders = {
        step: {
            "ms": 1e3 * median(turn[at] for turn in turns),
            "times_ours": median(turn[at] / turn[-1] for turn in turns),
            "least": min(turn[at] / turn[-1] for turn in turns),
            "most": max(turn[at] / turn[-1] for turn in turns),
        }
        for at, step in enumerate(STEPS)
    }
    return {"varied": name, "value": value, "contenders": contenders}


def lines(cases: list[dict]) -> Iterator[str]:
    """A table of the cases."""
    yield "| size | ours, s | masked path, s | faster (least, most) | by torch's products, s | faster (least, most) |"
    yield "|---|---|---|---|---|---|"
    for case in cases:
        ours, masked, by_torch = (case["contenders"][name] for name in ("ours", "masked", "torch"))
        cells = [f"{SWEEPS[case['varied']][0]} = {case['value']}", f"{ours['ms'] / 1e3:.2f}"]
        for other in (masked, by_torch):
            cells += [
                f"{other['ms'] / 1e3:.2f}",
                f"{other['times_ours']:.2f}x ({other['least']:.2f}, {other['most']:.2f})",
            ]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="How a training step on a CPU grows with N, r, K and m.")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each size (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (%(default)s)")
    options = parser.parse_args()
    check_agreement()
    device = torch.device("cpu")
    results = {
        "benchmark": "training_step",
        "device": describe(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "products": next(str(each) for each in explain(device) if each.op == "linear"),
        "usual": USUAL,
        "cases": [],
    }
    path = options.out / f"training_step-{slug(device_name(device))}.json"
    for name, (_, values) in SWEEPS.items():
        for value in values:
            results["cases"].append(measure(name, value, options.rounds))
            write(path, results)
    print(*lines(results["cases"]), f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()
