"""What a training step of a Llama has to do on a GPU, counted on a CPU: products of matrices, and bytes of all else.

    python -m lab.count_step [--matrix-tflops RATE --bandwidth-gbs RATE]

Products are those of bench_llama_step.py. The other operations of a layer (norms, rotary embeddings, activations, sums,
casts of autocast) are bound by memory: their inputs and outputs are added up while the layer runs once on short texts.
What the weights cost and what each token costs are told apart by two lengths, layers from the rest of the model by two
depths. Attention's own bytes, the head's and the optimizer's are not among them. From the rates of a card it tells the
milliseconds that both must take there.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench_llama_step import AHEAD_TOKENS, CASES, RATIONALES, SHAPES, THOUGHT_TOKENS, Case, Shape, make_model
from bench_training_step import useful_flops
from qstar.grid import Text
from qstar.talking import read_grid
from qstar.thinking import think

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach"}
LENGTHS, DEPTHS = (16, 32), (1, 2)
PHASES = ("think", "packed forward", "backward")


class BytesMoved(TorchDispatchMode):
    """Bytes that operations other than products and attention read and write inside."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "qstar_kernels" and name not in PRODUCTS | FREE and not func.is_view:
            self.total += sum(x.nbytes for x in tree_leaves((args, kwargs, results)) if isinstance(x, Tensor))
        return results


class Cost(NamedTuple):
    """Bytes of a layer: for its weights, and for each token that it reads."""

    fixed: float
    each: float


def bytes_by_phase(shape: Shape, layers: int, length: int) -> dict[str, int]:
    """Of one step of a model of that depth, on one text of that length."""
    model = make_model(shape._replace(layers=layers, vocabulary=512, checkpointing=False), length, torch.device("cpu"))
    text, grid = Text.from_inputs(torch.zeros(1, length, dtype=torch.int64)), model.grid(length)
    thoughts = torch.zeros(1, length, RATIONALES, THOUGHT_TOKENS, dtype=torch.int64)
    found = {}

    def count(phase: str, call: Callable[[], Tensor]) -> Tensor:
        with BytesMoved() as moved:
            result = call()
        found[phase] = moved.total
        return result

    with torch.autocast("cpu", torch.bfloat16):
        hidden = count("packed forward", lambda: read_grid(model, text, grid, thoughts))
        count("think", lambda: think(model, text, grid, temperature=1.0))
    count("backward", hidden.sum().backward)
    return found


def tokens_read(length: int) -> dict[str, int]:
    """By a layer, of one text."""
    slots = 1 + RATIONALES * (THOUGHT_TOKENS + AHEAD_TOKENS + 1)
    return {
        "think": length * (1 + RATIONALES * THOUGHT_TOKENS),
        "packed forward": length * slots,
        "backward": length * slots,
    }


def layer_costs(shape: Shape) -> dict[str, Cost]:
    counted = {(n, d): Counter(bytes_by_phase(shape, d, n)) for n in LENGTHS for d in DEPTHS}
    costs = {}
    for phase in PHASES:
        layer = {n: counted[n, DEPTHS[1]][phase] - counted[n, DEPTHS[0]][phase] for n in LENGTHS}
        short, long = (tokens_read(n)[phase] for n in LENGTHS)
        each = (layer[LENGTHS[1]] - layer[LENGTHS[0]]) / (long - short)
        costs[phase] = Cost(layer[LENGTHS[0]] - each * short, each)
    return costs


def gigabytes(case: Case, costs: dict[str, Cost]) -> dict[str, float]:
    """Of all layers and texts; with checkpointing the backward runs the forward again."""
    shape = SHAPES[case.shape]
    found = {
        phase: shape.layers * (costs[phase].fixed + costs[phase].each * case.batch * tokens) / 1e9
        for phase, tokens in tokens_read(case.positions).items()
    }
    if shape.checkpointing:
        found["backward"] += found["packed forward"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--matrix-tflops", type=float, help="of a large matrix product: adds a column of milliseconds")
    parser.add_argument("--bandwidth-gbs", type=float, help="of a large copy: the same")
    options = parser.parse_args()
    costs = {}
    header = ["model, N, B", "products, TFLOP", *(f"{phase}, GB" for phase in PHASES)]
    header += ["products, ms"] * bool(options.matrix_tflops) + ["all else, ms"] * bool(options.bandwidth_gbs)
    print(f"| {' | '.join(header)} |", "|---" * len(header) + "|", sep="\n")
    for case in CASES["cuda"]:
        shape = SHAPES[case.shape]
        key = shape.width, shape.intermediate, shape.heads, shape.kv_heads
        if key not in costs:
            costs[key] = layer_costs(shape)
        model = make_model(shape, case.positions, torch.device("meta"))
        products = case.batch * useful_flops(model, case.positions) / 1e12
        moved = gigabytes(case, costs[key])
        figures = [products, *(moved[phase] for phase in PHASES)]
        if options.matrix_tflops:
            figures.append(1e3 * products / options.matrix_tflops)
        if options.bandwidth_gbs:
            figures.append(1e3 * sum(moved.values()) / options.bandwidth_gbs)
        cells = [f"{case.shape}, {case.positions}, {case.batch}", *(f"{figure:.0f}" for figure in figures)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
