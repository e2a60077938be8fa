"""Launches of every kernel of the head on a shape of one's choice: what ``resources`` compiles and ``tune`` times."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, Tile
from qstar_kernels.lm_head import linear_log_prob, mix_hidden, sample_linear
from qstar_kernels.lm_head.logits import TILE, LogitMap
from qstar_kernels.lm_head.triton import mixing
from qstar_kernels.lm_head.triton.draws import Draws
from qstar_kernels.lm_head.triton.rows import COLUMN_MULTIPLE, Rows
from qstar_kernels.lm_head.triton.tiles import ANY_WIDTH, KERNELS, TABLE, WIDTHS

__all__ = ["KERNELS", "TABLE", "WIDTHS", "Shape", "build_launch", "candidates", "errors", "largest_served", "rivals"]

MIXING = ("mix", "mix_gradient", "base_gradient")
DRAWING = ("weigh_tiles", "draw")


class Shape(NamedTuple):
    """``rows`` rows of ``width`` values, ``base_rows`` of them before a thought, and a Llama 3 vocabulary."""

    width: int
    rows: int = 4096
    base_rows: int = 1024
    vocabulary: int = 128_256


def largest_served(width: int) -> int:
    """The key in the table of a tile that was timed at ``width``."""
    return ANY_WIDTH


def candidates(tile: Tile) -> list[Tile]:
    """``tile`` and those of a quarter to four times its columns, 128 to 16384 of them, with any number of warps.

    More than 4096 columns a warp would spill, after half a minute of compiling.
    """
    columns = [2**n for n in range(7, 15) if tile.keys <= 4 * 2**n <= 16 * tile.keys]
    others = (replace(tile, keys=keys, warps=warps) for keys, warps in product(columns, (1, 2, 4, 8, 16)))
    return [tile, *(other for other in others if other != tile and other.keys <= 4096 * other.warps)]


def rivals(kernel: str, architecture: str, dtype: torch.dtype, width: int) -> dict[str, list[Tile]]:
    """Kernels for some cards only, as attention has: none."""
    return {}


def build_launch(
    kernel: str, architecture: str, dtype: torch.dtype, shape: Shape, *, rules: bool = False, device: str = "meta"
) -> Launch:
    """A launch of one of ``KERNELS``; ``rules`` gives it all that is optional."""

    def states(*cells: int) -> Tensor:
        return torch.randn(*cells, shape.width, dtype=dtype, device=device)

    def values(of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape.rows, dtype=of, device=device)

    if kernel in MIXING:
        base, thought, head_weight = states(shape.base_rows), states(shape.rows), states()
        index = torch.arange(shape.rows, device=device) * shape.base_rows // shape.rows
        if kernel == "mix":
            mixed = torch.empty_like(thought)
            return mixing.mix_launch(
                base, thought, states(shape.rows), head_weight, index, rules, mixed, values(), architecture
            )
        d_mixed = states(shape.rows)
        if kernel == "mix_gradient":
            given = (d_mixed, values() if rules else None, base, thought, head_weight, index, values(), rules)
            grads = torch.empty_like(thought), torch.empty_like(thought), values()
            return mixing.mix_gradient_launch(*given, *grads, architecture)
        order = torch.arange(shape.rows, device=device)
        ends = torch.searchsorted(index, torch.arange(shape.base_rows, device=device), right=True)
        return mixing.base_gradient_launch(d_mixed, values(), order, ends, torch.empty_like(base), architecture)

    weight = states(shape.vocabulary)
    bias = torch.zeros(shape.vocabulary, dtype=dtype, device=device) if rules else None
    forbidden = torch.arange(1, device=device) if rules else None
    logit_map = LogitMap(0.7, 1.3, 30.0) if rules else LogitMap(1.0, 1.0, None)
    head = Rows(weight, bias, forbidden, logit_map, architecture)
    multiple = TILE if kernel in DRAWING else COLUMN_MULTIPLE
    y = torch.randn(shape.rows, -(-shape.vocabulary // multiple) * multiple, device=device)
    extra = values() if rules else None
    if kernel == "score":
        return head.score_launch(y, values(torch.int64), values(), extra)
    if kernel == "gradient":
        d_logits = y.view(dtype)[:, : shape.vocabulary]
        return head.gradient_launch(y, values(torch.int64), values(), extra, extra, values(), d_logits)
    step = torch.zeros((), dtype=torch.int64, device=device) if rules else 3
    rows = values(torch.int64) if rules else range(shape.rows)
    draws = Draws(head, logit_map, 1.0, 2**40, step)
    return draws.launches(y, rows, values(torch.int64), values())[kernel == "draw"]


def small_shape(width: int) -> Shape:
    """Of what :func:`errors` compares: more than one block of columns, the last of them not whole."""
    return Shape(width, rows=40, base_rows=11, vocabulary=20_001)


def errors(kernel: str, dtype: torch.dtype, width: int, device: str) -> tuple[float, float]:
    """Relative errors of the kernel and of the torch backend on a small shape, both against torch in float64."""
    generator = torch.Generator(device).manual_seed(0)
    shape = small_shape(width)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=dtype, device=device)

    hidden = random(shape.rows, width)
    if kernel in MIXING:
        features, d_mixed = random(shape.rows, width), random(shape.rows, width)
        head_weight, d_w = random(width, scale=width**-0.5), random(shape.rows)
        results, inputs = mix_results, (random(shape.base_rows, width), hidden, features, head_weight, d_mixed, d_w)
    else:  # a few tokens have most of a row's mass
        results, inputs = row_results, (hidden, random(shape.vocabulary, width, scale=3 * width**-0.5))
    exact = results(kernel, "torch", *(x.double() for x in inputs))
    ours, torchs = (results(kernel, backend, *inputs) for backend in ("triton", "torch"))
    return distance(ours, exact), distance(torchs, exact)


def mix_results(kernel: str, backend: str, base, thought, features, head_weight, d_mixed, d_w) -> list[Tensor]:
    """What ``backend`` makes with the kernel among others; no row has the last base row."""
    index = torch.arange(len(thought), device=thought.device) % (len(base) - 1)
    leaves = [x.detach().requires_grad_() for x in (base, thought, features, head_weight)]
    mixed, w = mix_hidden(*leaves, base_index=index, backend=backend)
    if kernel == "mix":
        return [mixed.detach(), w.detach()]
    return list(torch.autograd.grad((mixed, w), leaves, (d_mixed, d_w.to(w.dtype))))


def row_results(kernel: str, backend: str, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """As :func:`mix_results`; one token drawn wrongly is far above any rounding."""
    if kernel in DRAWING:
        tokens, log_prob = sample_linear(hidden, weight, seed=0, backend=backend)
        return [tokens.double(), log_prob]
    hidden = hidden.detach().requires_grad_()
    targets = torch.arange(len(hidden), device=hidden.device) * (len(weight) // len(hidden))
    log_prob, entropy = linear_log_prob(hidden, weight, targets, return_entropy=True, backend=backend)
    if kernel == "score":
        return [log_prob.detach(), entropy.detach()]
    return list(torch.autograd.grad(log_prob.sum(), hidden))


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of any."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)]).max().item()
