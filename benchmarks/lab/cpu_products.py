"""Linear layers on the CPU at hand by PyTorch's own choice and by oneDNN: what the rule in ``qstar_kernels`` rests on.

    python -m lab.cpu_products [--threads 1] [--rounds 15]

A line for each shape ``[m, k] x [k, n]``: how many times faster oneDNN is than PyTorch's choice, forward, in the
gradient of the rows and in that of the weight; the median of neighbouring runs. What ``"auto"`` is here, and why, comes
first. Where it is ``torch`` and what is taken gains clearly, ``cpu_products="onednn"`` is worth trying.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from lab.paired import cpu_clock, median_ratio, take_turns
from qstar_kernels import explain, products

SHAPES = [  # m, k, n
    *((7424, 256, n) for n in (128, 256, 768)),
    (7424, 768, 256),
    *((512, 256, n) for n in (128, 256, 768)),
    (1024, 256, 4096),
    *((m, 64, 64) for m in (9000, 1152, 512)),
    *((m, 256, 256) for m in (128, 64, 32, 16)),
    *((m, 1024, 1024) for m in (16, 8, 4, 1)),
    (7424, 256, 8),
    (7424, 8, 256),
]


def speedups(m: int, k: int, n: int, rounds: int) -> list[float]:
    """Of oneDNN over PyTorch's choice: forward, gradient of the rows, gradient of the weight."""
    x, weight, d_out = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    pairs = [
        (lambda: F.linear(x, weight), lambda: products.multiply(x, weight)),
        (lambda: d_out @ weight, lambda: products.multiply(d_out, weight.t())),
        (lambda: d_out.t() @ x, lambda: products.multiply(d_out.t(), x.t())),
    ]
    found = []
    for own, other in pairs:
        own(), other()
        times = take_turns({"torch": own, "onednn": other}, cpu_clock, fewest=rounds, most=rounds)
        found.append(median_ratio(times["torch"], times["onednn"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Linear layers on this CPU by PyTorch's own choice and by oneDNN.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(*(each for each in explain("cpu") if each.op == "linear"))
    if (refusal := products.find_refusal()) is not None:
        raise SystemExit(f"oneDNN cannot be measured: {refusal}")
    print(f"{options.threads} threads\n    m      k      n  taken  forward  rows  weight")
    for m, k, n in SHAPES:
        taken = "yes" if products.pays(m, k, n) else "no"
        ratios = "  ".join(f"{ratio:6.2f}" for ratio in speedups(m, k, n, options.rounds))
        print(f"{m:5d}  {k:5d}  {n:5d}  {taken:>5}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
