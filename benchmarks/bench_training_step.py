"""The whole training step, without the optimizer: ours beside the masked path as the authors compute it.

Ours also with the library of float32 products that PyTorch takes itself, which is that of the masked path.

The shape is small: a Mistral of 4 layers, 256 wide, two rationales of 9 sampled tokens scored on 4 text tokens.
The mixing head is not zero, so that rewards differ and policy rows meet the head.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from masked_path import SAME, masked_objective
from qstar.config import QuietStarConfig
from qstar.cpu import keep_freed_memory
from qstar.learning import Objective
from qstar.wrapping import attach
from qstar_kernels import cpu_products, explain

LENGTHS = [128, 256]
THOUGHT_TOKENS, AHEAD_TOKENS, RATIONALES = 9, 4, 2
SIZES = dict(thought_tokens=THOUGHT_TOKENS, ahead_tokens=AHEAD_TOKENS, rationales=RATIONALES)


def make_model(attention: str, **changes: int) -> PreTrainedModel:
    """The model of the comparison, the same weights whatever its attention; ``changes`` to ``SIZES``."""
    keep_freed_memory()  # as qstar.train does
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        max_position_embeddings=4096,
    )
    model = MistralForCausalLM(config)
    attach(model, QuietStarConfig(start_token_id=4094, end_token_id=4095, **(SIZES | changes)))
    with torch.no_grad():
        model.qstar_start.normal_(0, 0.02)
        model.qstar_end.normal_(0, 0.02)
        model.qstar_mixing_head.output.weight.normal_(0, 0.1)
    model.set_attn_implementation(attention)
    return model.train()


def texts(length: int) -> Tensor:
    """One row of random tokens, ``[1, N]``."""
    return torch.randint(4094, (1, length), generator=torch.Generator().manual_seed(0))


def our_step(model: PreTrainedModel, tokens: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    SAME(model, tokens).loss.backward()


def masked_step(model: PreTrainedModel, tokens: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    masked_objective(model, tokens).backward()


def our_step_by_torch(model: PreTrainedModel, tokens: Tensor) -> None:
    with cpu_products("torch"):
        our_step(model, tokens)


STEPS = {"masked": masked_step, "torch": our_step_by_torch, "ours": our_step}
ATTENTION = {"masked": "sdpa", "torch": "qstar", "ours": "qstar"}


def useful_flops(model: PreTrainedModel, length: int) -> float:
    """Multiply-adds of matrices times two, forward and backward over the grid, and forward while thinking."""
    config, settings = model.config, model.qstar
    grid = model.grid(length)
    layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)
    width = config.num_attention_heads * config.head_dim
    text_keys = length * (length + 1) / 2
    thought_rows = length * settings.rationales * settings.thought_tokens
    talk_rows = length * settings.rationales * settings.ahead_tokens
    own_keys = length * settings.rationales * grid.rationale_length * (grid.rationale_length + 1) / 2
    own_thought_keys = length * settings.rationales * settings.thought_tokens * (settings.thought_tokens + 1) / 2
    head = 2 * config.hidden_size * config.vocab_size

    packed = 2 * layers * length * grid.slots + config.num_hidden_layers * 4 * width * (
        grid.slots * text_keys + own_keys
    )
    pairs = (1 + settings.rationales * settings.thought_tokens) * text_keys + own_thought_keys
    thinking = 2 * layers * (length + thought_rows) + config.num_hidden_layers * 4 * width * pairs
    mixing = talk_rows * 2 * sum(p.numel() for p in model.qstar_mixing_head.parameters() if p.dim() == 2)
    scored = length + talk_rows + thought_rows / settings.rationales
    return 3 * (packed + mixing + head * scored) + thinking + head * thought_rows


def _report_peak(name: str, length: int, queue: multiprocessing.Queue) -> None:
    STEPS[name](make_model(ATTENTION[name]), texts(length))
    status = Path("/proc/self/status").read_text()  # unlike ru_maxrss, not inherited from the process that started this
    queue.put(int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024)


def peak_memory(name: str, length: int) -> int:
    """Peak resident memory in bytes of a process, Python included, that does nothing but one step. Linux."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_report_peak, args=(name, length, queue))
    process.start()
    peak = queue.get(timeout=600)
    process.join()
    return peak


def seconds(step, *arguments) -> float:
    began = perf_counter()
    step(*arguments)
    return perf_counter() - began


def in_turn(length: int, rounds: int, **changes: int) -> list[tuple[float, ...]]:
    """Seconds of the ``STEPS``, taken in turn."""
    models = {name: make_model(ATTENTION[name], **changes) for name in STEPS}
    tokens = texts(length)
    for name in ("torch", "ours"):
        STEPS[name](models[name], tokens)
    return [tuple(seconds(step, models[name], tokens) for name, step in STEPS.items()) for _ in range(rounds)]


def by_positions(length: int, counts: list[int], rounds: int) -> list[tuple[float, ...]]:
    """Seconds of our step with thoughts at all positions of a row and at ``counts`` of them, taken in turn."""
    model, tokens = make_model("qstar"), texts(length)
    objectives = [replace(SAME, positions_per_row=count) for count in (None, *counts)]

    def step(objective: Objective) -> None:
        model.zero_grad(set_to_none=True)
        objective(model, tokens).loss.backward()

    for objective in objectives:
        step(objective)
    return [tuple(seconds(step, objective) for objective in objectives) for _ in range(rounds)]


def check_agreement() -> None:
    """Both paths find the same loss and gradients for the same thoughts."""
    tokens = texts(12)
    thoughts = torch.randint(4094, (1, 12, RATIONALES, THOUGHT_TOKENS), generator=torch.Generator().manual_seed(1))
    ours, masked = make_model("qstar"), make_model("sdpa")
    loss, expected = (
        SAME(ours, tokens, thoughts=thoughts).loss,
        masked_objective(masked, tokens, thoughts=thoughts),
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, parameter), other in zip(ours.named_parameters(), masked.parameters(), strict=True):
        error = (parameter.grad - other.grad).norm() / other.grad.norm()
        assert error < 1e-4, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize("length", LENGTHS)
def test_training_step(benchmark, length):
    check_agreement()
    model = make_model("qstar")
    turns = in_turn(length, rounds=3)
    benchmark.extra_info["ratio_to_masked_path"] = median(masked / ours for masked, _, ours in turns)
    benchmark.extra_info["ratio_to_torch_products"] = median(by_torch / ours for _, by_torch, ours in turns)
    benchmark.extra_info["masked_path_seconds"] = median(masked for masked, *_ in turns)
    benchmark.extra_info["products"] = next(str(each) for each in explain("cpu") if each.op == "linear")
    benchmark.extra_info["useful_gflop"] = useful_flops(model, length) / 1e9
    benchmark.extra_info["peak_memory_gb"] = peak_memory("ours", length) / 1e9
    benchmark.extra_info["masked_path_peak_memory_gb"] = peak_memory("masked", length) / 1e9
    benchmark.pedantic(partial(our_step, model, texts(length)), rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="One training step at any length: seconds and peak memory of both paths."
    )
    parser.add_argument("lengths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--positions-per-row",
        type=int,
        nargs="+",
        metavar="n",
        help="ours alone, with thoughts at so many positions of a row beside all",
    )
    options = parser.parse_args()
    check_agreement()
    print(*(each for each in explain("cpu") if each.op == "linear"))
    for length in options.lengths if options.positions_per_row else ():
        turns = by_positions(length, options.positions_per_row, options.rounds)
        for at, count in enumerate([length, *options.positions_per_row]):
            print(
                f"N {length}, thoughts at {count} positions: {median(turn[at] for turn in turns):.2f} s, "
                f"{spread(turn[at] / turn[0] for turn in turns)} as long as at all"
            )
    for length in () if options.positions_per_row else options.lengths:
        turns = in_turn(length, options.rounds)
        masked, by_torch, ours = (median(column) for column in zip(*turns, strict=True))
        memory = [peak_memory(name, length) / 1e9 for name in ("masked", "ours")]
        print(
            f"N {length}: masked path {masked:.2f} s, {memory[0]:.2f} GB; ours {ours:.2f} s, {memory[1]:.2f} GB, "
            f"by torch's products {by_torch:.2f} s; ours is {spread(turn[0] / turn[2] for turn in turns)} as fast as "
            f"the masked path, and {spread(turn[1] / turn[2] for turn in turns)} as fast as by torch's products"
        )


def spread(ratios: Iterable[float]) -> str:
    """Their median, least and largest."""
    ordered = sorted(ratios)
    return f"{median(ordered):.2f}x ({ordered[0]:.2f} to {ordered[-1]:.2f})"


if __name__ == "__main__":
    main()
