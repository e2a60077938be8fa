"""How fast a training step on a CPU could be at most: with attention that takes no time, or only that of its products.

    python -m lab.step_limit 128 256 512 [--rounds 5]

Taken in turn: the masked path of ``bench_training_step.py``, our step, our step with zeros in the place of what thought
attention computes, and the bare products of its text keys by oneDNN, as many and as large as a step makes them, without
masks, exponentials, sums, and what a thought's tokens make of each other. What is left beside attention is the model's
own code.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from statistics import median

import torch
from torch import Tensor

from bench_training_step import (
    ATTENTION,
    RATIONALES,
    THOUGHT_TOKENS,
    check_agreement,
    make_model,
    masked_step,
    our_step,
    seconds,
    texts,
)
from qstar_kernels import products

backend = import_module("qstar_kernels.thought_attention.torch")
onednn = import_module("qstar_kernels.thought_attention.torch.onednn")
FORWARD, BACKWARD = 2, 5  # products of attention


@contextmanager
def attention_for_free() -> Iterator[None]:
    """The packed op, its gradients and the steps of thinking are zeros, at once; nothing else is called in a step."""
    kept = {name: getattr(backend, name) for name in ("attend", "attend_backward", "attend_step")}

    def zeros(first: int):
        def fill(*arguments: object) -> None:
            for each in arguments[first:]:
                if isinstance(each, Tensor):
                    each.zero_()

        return fill

    backend.attend, backend.attend_backward, backend.attend_step = zeros(5), zeros(8), zeros(7)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(backend, name, value)


def bare_products(length: int) -> Iterator[tuple[int, int, int]]:
    """(passes, keys, rows) of the products with text keys in a step: how many, [keys, D] with [D, rows] each."""
    model = make_model(ATTENTION["ours"])
    config, slots = model.config, model.grid(length).slots
    for calls, here in (((FORWARD + BACKWARD), slots), (FORWARD * THOUGHT_TOKENS, RATIONALES), (FORWARD, 1)):
        q = torch.empty(1, config.num_attention_heads, length, here, config.head_dim, device="meta")
        k = torch.empty(1, config.num_key_value_heads, length, config.head_dim, device="meta")
        for block in onednn.blocks(q, k):
            yield calls * config.num_hidden_layers * k.shape[1], block.seen, block.size * block.width


def time_products(length: int) -> float:
    """Seconds that the bare products of a step take, of values that lie in the caches where they can."""
    width, total = make_model(ATTENTION["ours"]).config.head_dim, 0.0
    for passes, keys, rows in bare_products(length):
        a, b, weights = torch.randn(keys, width), torch.randn(rows, width), torch.randn(keys, rows)
        for first, second in ((a, b), (a.t(), weights.t())):  # about half make scores, the others sum over them
            products.multiply(first, second)  # a shape that is new takes longer
            total += passes / 2 * seconds(products.multiply, first, second)
    return total


def measure(length: int, rounds: int) -> dict[str, float]:
    """Median seconds of the masked path, ours, ours with attention for free, and of attention's bare products."""
    ours, masked, tokens = make_model(ATTENTION["ours"]), make_model(ATTENTION["masked"]), texts(length)
    our_step(ours, tokens)
    turns = []
    for _ in range(rounds):
        turn = {"masked": seconds(masked_step, masked, tokens), "ours": seconds(our_step, ours, tokens)}
        with attention_for_free():
            turn["free"] = seconds(our_step, ours, tokens)
        turns.append(turn | {"products": time_products(length)})
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


def line(length: int, found: dict[str, float]) -> str:
    """A row of the table: seconds, and how many times as fast as the masked path each would be."""
    bare = found["free"] + found["products"]
    cells = [f"{found['masked']:.2f}"]
    cells += [f"{each:.2f} ({found['masked'] / each:.1f}x)" for each in (found["ours"], bare, found["free"])]
    return f"| {length} | {' | '.join(cells)} |"


def at_least_one(text: str) -> int:
    """A count, out of an argument."""
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"it is {count}, but it must be at least 1")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("lengths", type=at_least_one, nargs="+", metavar="N")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="turns of each length (%(default)s)")
    options = parser.parse_args()
    if (refusal := products.find_refusal()) is not None:
        parser.exit(2, f"error: oneDNN's products cannot be timed: {refusal}\n")
    check_agreement()
    print("| N | masked path, s | ours, s | attention by its products alone, s | without attention, s |")
    print("|---|---|---|---|---|")
    for length in options.lengths:
        print(line(length, measure(length, options.rounds)), flush=True)


if __name__ == "__main__":
    main()
