"""A whole training step of Llamas of 135M, 1B and 7B parameters, optimizer included, beside the step-by-step path.

    python benchmarks/bench_llama_step.py [--quick] [--seconds S] [--out FOLDER]

Random weights; N tokens of text, two rationales of 8 sampled tokens scored on 4; on a GPU bfloat16 autocast over
float32 weights. ``ours_graph`` replays thinking from a CUDA graph. Prints a table while it goes and writes
``llama_step-<device>.json``: milliseconds, text tokens a second, useful TFLOP/s, peak memory beyond weights and
optimizer, and the milliseconds of each phase in a step of its own, under the profiler: wall time on a CPU, that of the
kernels on a GPU. On a CPU it takes one tiny shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.optimization import Adafactor

from bench_training_step import check_agreement, useful_flops
from lab.device_limits import Limits
from lab.ranges import seconds_by_range
from lab.results_file import Job, Peer, measure_peers, parse_options, run, this_device
from masked_path import SAME, masked_objective
from qstar.config import QuietStarConfig
from qstar.experimental import cuda_graph
from qstar.wrapping import attach

THOUGHT_TOKENS, AHEAD_TOKENS, RATIONALES = 8, 4, 2
ATTENTION = {"ours": "qstar", "ours_graph": "qstar", "step_by_step": "sdpa"}
PHASES = {  # and the ranges that a step opens for them
    "think": "qstar::think",
    "talk": "qstar::talk",
    "learn": "qstar::learn",
    "backward": "step::backward",
    "optimizer": "step::optimizer",
}


class Shape(NamedTuple):
    """A Llama, and what it takes to train it on one card."""

    width: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    optimizer: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True)
    checkpointing: bool = False


LLAMA_1B = Shape(2048, 8192, 16, 32, 8, 128256, True)
SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, 512, True),
    "135M": Shape(576, 1536, 30, 9, 3, 49152, True),
    "1B": LLAMA_1B,
    "1B checkpointed": LLAMA_1B._replace(checkpointing=True),
    "7B": Shape(4096, 11008, 32, 32, 32, 32000, False, partial(Adafactor, lr=1e-5, relative_step=False), True),
}


class Case(NamedTuple):
    shape: str
    positions: int
    batch: int


CASES = {
    "cpu": [Case("tiny", 32, 2)],
    "cuda": [  # the most telling first, since time may run out
        Case("1B", 256, 4),
        Case("1B", 1024, 1),
        Case("135M", 256, 4),
        Case("135M", 1024, 1),
        Case("7B", 256, 8),
        Case("1B checkpointed", 256, 8),
        Case("7B", 1024, 2),
    ],
}
QUICK = 1  # cases of a quick run


def make_model(shape: Shape, positions: int, device: torch.device) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=2 * positions + 64,
    )
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(config)
    start, end = shape.vocabulary - 2, shape.vocabulary - 1
    sizes = dict(thought_tokens=THOUGHT_TOKENS, ahead_tokens=AHEAD_TOKENS, rationales=RATIONALES)
    attach(model, QuietStarConfig(start_token_id=start, end_token_id=end, **sizes))
    with torch.no_grad():
        for vector in (model.qstar_start, model.qstar_end):
            vector.normal_(0, 0.02)
        model.qstar_mixing_head.output.weight.normal_(0, 0.1)
    if shape.checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return model.train()


class Step:
    """A training step of one model, by any path."""

    def __init__(self, case: Case, device: torch.device):
        shape = SHAPES[case.shape]
        self.device = device
        self.model = make_model(shape, case.positions, device)
        self.optimizer = shape.optimizer(self.model.parameters())
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(shape.vocabulary - 2, (case.batch, case.positions), generator=generator).to(device)

    def loss(self, path: str) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            if path == "step_by_step":
                return masked_objective(self.model, self.tokens)
            return SAME(self.model, self.tokens).loss

    def prepare(self, path: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            if self.model.config._attn_implementation != ATTENTION[path]:
                self.model.set_attn_implementation(ATTENTION[path])
            (cuda_graph.enable if path == "ours_graph" else cuda_graph.disable)(self.model)
            self.optimizer.zero_grad(set_to_none=True)  # one that ran out of memory may have left some
            loss = self.loss(path)
            with record_function(PHASES["backward"]):
                loss.backward()
            with record_function(PHASES["optimizer"]):
                self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return call

    def phases(self) -> dict[str, float]:
        """Milliseconds of the phases of one of our steps, by the clock of :func:`lab.ranges.seconds_by_range`."""
        step = self.prepare("ours")
        step()
        found = seconds_by_range(step, PHASES.values(), self.device)
        return {phase: 1e3 * found[name] for phase, name in PHASES.items()}


def check_loss(peer: Peer, loss: Tensor) -> float:
    """A loss of random thoughts is no more than finite; that the paths agree is checked on a small model."""
    if not loss.isfinite():
        raise ArithmeticError(f"the loss of {peer.name} is {loss.item()}")
    return float("nan")


def measure(case: Case, limits: Limits, device: torch.device) -> dict:
    step = Step(case, device)
    flops = case.batch * useful_flops(step.model, case.positions)
    bound_ms = 1e3 * flops / limits.matrix_flops
    peers = [Peer(path, partial(step.prepare, path)) for path in ATTENTION]
    records, absent = measure_peers(peers, lambda peer: peer.prepare(), check_loss, flops, bound_ms, device)
    for record in records.values():
        del record["error"]
        record["text_tokens_per_s"] = 1e3 * case.batch * case.positions / record["ms"]
    shape = SHAPES[case.shape]
    resident = 0 if device.type == "cpu" else torch.cuda.memory_allocated(device)  # weights and optimizer
    return {
        "pass": "training step",
        "model": case.shape,
        "parameters": sum(parameter.numel() for parameter in step.model.parameters()),
        "positions": case.positions,
        "batch": case.batch,
        "checkpointing": shape.checkpointing,
        "optimizer": type(step.optimizer).__name__,
        "resident_mib": resident / 2**20,
        "useful_gflop": flops / 1e9,
        "bound_ms": bound_ms,
        "contenders": records,
        "absent": absent,
        "phases_clock": "wall time" if device.type == "cpu" else "time of the kernels",
        "phases_ms": step.phases(),
    }


def headline(record: dict) -> str:
    phases = ", ".join(f"{name} {milliseconds:.1f}" for name, milliseconds in record["phases_ms"].items())
    speed = record["contenders"]["ours"]["text_tokens_per_s"]
    return (
        f"{record['model']}: N {record['positions']}, B {record['batch']}, {record['optimizer']}"
        f"{', checkpointing' * record['checkpointing']}; {speed:.4g} text tokens/s; "
        f"ms, {record['phases_clock']}: {phases}"
    )


def jobs(cases: list[Case], device: torch.device) -> Iterator[Job]:
    for case in cases:
        label = f"{case.shape}, N {case.positions}, B {case.batch}"
        yield Job(label, partial(measure, case, device=device), headline)


def main() -> None:
    options = parse_options(__doc__.partition("\n")[0], f"only the first {QUICK} shapes")
    check_agreement()
    device = this_device()
    cases = CASES[device.type][: QUICK if options.quick else None]
    run("llama_step", device, jobs(cases, device), options.out, options.seconds)


if __name__ == "__main__":
    main()
