"""Launches of the head's Triton kernels: mixing, and what happens to rows of logits between products by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.launch import Launch, architecture_of, device_refusal, run_all
from qstar_kernels.lm_head.logits import LogitMap, add_product
from qstar_kernels.lm_head.mix_kernels import base_gradient_kernel, mix_gradient_kernel, mix_kernel
from qstar_kernels.lm_head.row_kernels import gradient_kernel, score_kernel
from qstar_kernels.lm_head.sample_kernels import draw_kernel, weigh_tiles_kernel
from qstar_kernels.lm_head.tiles import find_tile

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TILE = 128  # columns, of the draws' first stage
COLUMN_MULTIPLE = 16  # keeps rows of logits and of their gradients aligned, as matrix libraries want them


def unsupported(name: str, x: Tensor) -> str | None:
    """Why the kernels cannot run on ``x``, the argument ``name``, or None."""
    refusal = device_refusal(name, x)
    return f"{name} has dtype {x.dtype}" if refusal is None and x.dtype not in DTYPES else refusal


def mix_launch(
    base, thought, features, head_weight, base_index, sigmoid: bool, mixed: Tensor, w: Tensor, architecture: str
) -> Launch:
    rows, width = thought.shape
    arguments = {
        "base": base,
        "thought": thought,
        "features": features,
        "head_weight": head_weight,
        "base_index": base_index,
        "mixed": mixed,
        "w": w,
        "base_stride": base.stride(),
        "thought_stride": thought.stride(),
        "features_stride": features.stride(),
        "head_stride": (0, *head_weight.stride()),
        "width": width,
        "SIGMOID": sigmoid,
    }
    return Launch(mix_kernel, rows, arguments, find_tile("mix", architecture, thought.dtype, width))


def mix_gradient_launch(
    d_mixed, d_w, base, thought, head_weight, base_index, w, sigmoid: bool, d_thought, d_features, d_score, architecture
) -> Launch:
    rows, width = thought.shape
    arguments = {
        "d_mixed": d_mixed,
        "d_weight": d_w,
        "base": base,
        "thought": thought,
        "head_weight": head_weight,
        "base_index": base_index,
        "w": w,
        "d_thought": d_thought,
        "d_features": d_features,
        "d_score": d_score,
        "d_mixed_stride": None if d_mixed is None else d_mixed.stride(),
        "base_stride": base.stride(),
        "thought_stride": thought.stride(),
        "head_stride": (0, *head_weight.stride()),
        "width": width,
        "SIGMOID": sigmoid,
    }
    return Launch(mix_gradient_kernel, rows, arguments, find_tile("mix_gradient", architecture, thought.dtype, width))


def base_gradient_launch(d_mixed, w, order, ends, d_base: Tensor, architecture: str) -> Launch:
    rows, width = d_base.shape
    tile = find_tile("base_gradient", architecture, d_base.dtype, width)
    arguments = {
        "d_mixed": d_mixed,
        "w": w,
        "order": order,
        "ends": ends,
        "d_base": d_base,
        "d_mixed_stride": d_mixed.stride(),
        "width": width,
    }
    return Launch(base_gradient_kernel, rows * -(-width // tile.keys), arguments, tile)


def mix(base, thought, features, head_weight, base_index, sigmoid: bool) -> tuple[Tensor, Tensor]:
    mixed = thought.new_empty(thought.shape)
    w = thought.new_empty(len(thought), dtype=torch.float32)
    base_index = None if base_index is None else base_index.contiguous()
    architecture = architecture_of(thought.device)
    launch = mix_launch(base, thought, features, head_weight, base_index, sigmoid, mixed, w, architecture)
    run_all([launch], thought)
    return mixed, w


def mix_gradients(d_mixed, d_w, base, thought, features, head_weight, base_index, w, sigmoid: bool, needs):
    """Gradients of base, thought and features where needed, and of ``features . head_weight``."""
    through_mixed = d_mixed is not None
    d_base = base.new_empty(base.shape) if needs[0] and through_mixed else None
    d_thought = thought.new_empty(thought.shape) if needs[1] and through_mixed else None
    d_features = features.new_empty(features.shape) if needs[2] else None
    d_score = torch.empty_like(w)
    d_w = None if d_w is None else d_w.contiguous()
    base_index = None if base_index is None else base_index.contiguous()
    architecture = architecture_of(thought.device)
    results = (d_thought, d_features, d_score)
    launches = [
        mix_gradient_launch(d_mixed, d_w, base, thought, head_weight, base_index, w, sigmoid, *results, architecture)
    ]
    if d_base is not None:
        order = ends = None
        if base_index is not None:
            sorted_index, order = base_index.sort(stable=True)
            ends = torch.searchsorted(sorted_index, torch.arange(len(base), device=base.device), right=True)
        launches.append(base_gradient_launch(d_mixed, w, order, ends, d_base, architecture))
    run_all(launches, thought)
    return d_base, d_thought, d_features, d_score


class TritonRows:
    """A head, whose ``weight`` has been through ``as_operand``, and the rows of its logits: twin of ``TorchRows``."""

    column_multiple = COLUMN_MULTIPLE

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        forbidden: Tensor | None,
        logit_map: LogitMap,
        architecture: str | None = None,
    ):
        temperature, logit_scale, softcap = logit_map
        self.weight = weight
        self.bias = None if bias is None else bias.contiguous()
        self.forbidden = forbidden
        self.gain = logit_scale / (temperature if softcap is None else softcap)
        self.cap = None if softcap is None else softcap / temperature
        self.slope = logit_scale / temperature
        self.architecture = architecture or architecture_of(weight.device)

    def multiply(self, factors: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Fill the first V columns of ``y`` with h W^T, the forbidden ones with -inf; the rest is for the kernels."""
        for index, factor in enumerate(factors):
            add_product(y[:, : len(self.weight)], factor, self.weight.T, beta=float(index > 0))
        return y if self.forbidden is None else y.index_fill_(1, self.forbidden, -torch.inf)

    def score(self, y: Tensor, targets: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """log_prob and entropy of every row."""
        log_prob = y.new_empty(len(y))
        entropy = y.new_empty(len(y)) if want_entropy else None
        run_all([self.score_launch(y, targets, log_prob, entropy)], y)
        return log_prob, entropy

    def gradient(
        self,
        y: Tensor,
        targets: Tensor,
        d_log_prob: Tensor,
        d_entropy: Tensor | None,
        entropy: Tensor | None,
        log_prob: Tensor | None,
    ) -> Tensor:
        """The gradient of h W^T + bias as a factor of products, in the memory of ``y``; fills log_prob, if any."""
        d_logits = y.view(self.weight.dtype)[:, : len(self.weight)]
        run_all([self.gradient_launch(y, targets, d_log_prob, d_entropy, entropy, log_prob, d_logits)], y)
        return d_logits

    def score_launch(self, y: Tensor, targets: Tensor, log_prob: Tensor, entropy: Tensor | None) -> Launch:
        arguments = {"targets": targets, "log_prob": log_prob, "entropy": entropy}
        return self.launch("score", score_kernel, y, arguments)

    def gradient_launch(self, y, targets, d_log_prob, d_entropy, entropy, log_prob, d_logits: Tensor) -> Launch:
        arguments = {
            "targets": targets,
            "d_log_prob": d_log_prob,
            "d_entropy": d_entropy,
            "entropy": entropy,
            "log_prob": log_prob,
            "d_logits": d_logits,
            "d_row_stride": d_logits.stride(0),
            "slope": self.slope,
        }
        return self.launch("gradient", gradient_kernel, y, arguments)

    def launch(self, name: str, kernel, y: Tensor, arguments: dict) -> Launch:
        """A program for each row of ``y``."""
        shared = {
            "logits": y,
            "bias": self.bias,
            "vocabulary": len(self.weight),
            "width": y.shape[1],
            "gain": self.gain,
            "cap": self.cap,
        }
        tile = find_tile(name, self.architecture, self.weight.dtype, len(self.weight))
        return Launch(kernel, len(y), shared | arguments, tile)


class TritonDraws:
    """Draws from chunks of logits; the twin of ``sample.TorchDraws``."""

    def __init__(
        self, head: TritonRows, logit_map: LogitMap, temperature: float, seed: int | Tensor, step: int | Tensor
    ):
        self.head = head
        self.seed, self.step = signed(seed), signed(step)
        self.greedy = temperature == 0
        self.ratio = 1.0 if self.greedy else logit_map.temperature / temperature

    def draw(self, y: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
        """tokens and log_prob of rows that are numbered from ``first_row``."""
        tokens, log_prob = y.new_empty(len(y), dtype=torch.int64), y.new_empty(len(y))
        run_all(self.launches(y, first_row, tokens, log_prob), y)
        return tokens, log_prob

    def launches(self, y: Tensor, first_row: int, tokens: Tensor, log_prob: Tensor) -> list[Launch]:
        vocabulary = len(self.head.weight)
        shape = len(y), -(-vocabulary // TILE)
        masses = {
            "tops": y.new_empty(shape),
            "masses": y.new_empty(shape, dtype=torch.int64),
            "draw_masses": None if self.ratio == 1 else y.new_empty(shape, dtype=torch.int64),
            "tiles": shape[1],
            "ratio": self.ratio,
            "TILE": TILE,
        }
        draw = {
            "tokens": tokens,
            "log_prob": log_prob,
            "unit": 2.0 ** (62 - vocabulary.bit_length()),
            "seed": self.seed,
            "step": self.step,
            "first_row": first_row,
            "GREEDY": self.greedy,
            "SEED_IN_MEMORY": isinstance(self.seed, Tensor),
            "STEP_IN_MEMORY": isinstance(self.step, Tensor),
        }
        return [
            self.head.launch("weigh_tiles", weigh_tiles_kernel, y, masses),
            self.head.launch("draw", draw_kernel, y, masses | draw),
        ]


def signed(value: int | Tensor) -> int | Tensor:
    """The low 64 bits as the kernels take them."""
    return value if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63
