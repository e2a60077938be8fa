"""Launches of every attention kernel on a shape of one's choice: what ``resources`` compiles and ``tune`` times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, Tile
from qstar_kernels.thought_attention import torch as torch_backend
from qstar_kernels.thought_attention import triton as triton_backend
from qstar_kernels.thought_attention.gluon import launches as hopper
from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.triton import launches
from qstar_kernels.thought_attention.triton.tiles import HOPPER_KERNELS, KERNELS, TABLE, WIDTHS

__all__ = ["KERNELS", "TABLE", "WIDTHS", "Shape", "build_launch", "candidates", "errors", "largest_served", "rivals"]


class Shape(NamedTuple):
    """A Llama-like layer's; ``width`` values a head, one thought of ``tokens`` tokens at each position."""

    width: int
    batch: int = 8
    positions: int = 1024
    tokens: int = 16
    heads: int = 32
    kv_heads: int = 8


def largest_served(width: int) -> int:
    """The key in the table of a tile that was timed at ``width``."""
    return width


def candidates(tile: Tile) -> list[Tile]:
    """``tile`` and those that differ from it by one step in at most two of its four numbers."""
    sizes = [[x // 2, x, 2 * x] for x in (tile.rows, tile.keys)]
    numbers = [*sizes, [4, 8], [tile.stages - 1, tile.stages, tile.stages + 1]]
    found = [tile]
    for rows, keys, warps, stages in product(*numbers):
        changed = (rows != tile.rows) + (keys != tile.keys) + (warps != tile.warps) + (stages != tile.stages)
        if 0 < changed <= 2 and min(rows, keys) >= 16 and stages >= 1:
            found.append(Tile(rows, keys, warps, stages))
    return found


def rivals(kernel: str, architecture: str, dtype: torch.dtype, width: int) -> dict[str, list[Tile]]:
    """Kernels that do the same on some cards and widths only, and their tiles to try; faster ones join the table."""
    rival = f"hopper_{kernel}"
    if architecture != "sm_90" or dtype.itemsize != 2 or width not in hopper.TILES.get(rival, {}):
        return {}
    return {rival: hopper.TILES[rival][width]}


@contextmanager
def otherwise_plain(kernel: str) -> Iterator[None]:
    """Inside, every kernel but ``kernel`` is in plain Triton."""
    with ExitStack() as stack:
        for other in HOPPER_KERNELS:
            if other != kernel:
                stack.enter_context(TABLE.trying(other, None))
        yield


@contextmanager
def all_for_hopper(width: int) -> Iterator[None]:
    """Inside, calls with rows of ``width`` values go to the Hopper kernels that take them, with their first tiles."""
    with ExitStack() as stack:
        for kernel, by_width in hopper.TILES.items():
            stack.enter_context(TABLE.trying(kernel, by_width[width][0] if width in by_width else None))
        yield


def every_rule(shape: Shape, dtype: torch.dtype, device: str) -> Rules:
    start = torch.zeros(shape.batch, shape.positions, dtype=torch.int64, device=device)
    sinks = torch.zeros(shape.heads, dtype=dtype, device=device)
    return Rules(shape.width**-0.5, window=shape.positions // 2, softcap=30.0, sinks=sinks, text_start=start)


def build_launch(
    kernel: str, architecture: str, dtype: torch.dtype, shape: Shape, *, rules: bool = False, device: str = "meta"
) -> Launch:
    """A launch of a kernel with ``rules`` or without, in a transformer's layout: heads inside slots."""
    with otherwise_plain(kernel):
        launch = build_on(kernel.removeprefix("hopper_"), architecture, dtype, shape, rules, device)
    if (launch.language == "gluon") != (kernel in HOPPER_KERNELS):
        raise ValueError(f"kernel is {kernel!r}, but it cannot take rows of {shape.width} values in {dtype} like these")
    return launch


def build_on(kernel: str, architecture: str, dtype: torch.dtype, shape: Shape, rules: bool, device: str) -> Launch:
    def states(heads: int, *cells: int) -> Tensor:
        x = torch.randn(shape.batch, *cells, heads, shape.width, dtype=dtype, device=device)
        return x.movedim(-2, 1)

    given = every_rule(shape, dtype, device) if rules else Rules(shape.width**-0.5)
    positions, slots = shape.positions, 1 + shape.tokens
    heads, kv_heads = shape.heads, shape.kv_heads
    if kernel == "step":
        q, out = states(heads, positions, 1), states(heads, positions, 1)
        k_text, v_text = states(kv_heads, positions), states(kv_heads, positions)
        k_own, v_own = states(kv_heads, positions, 1, shape.tokens), states(kv_heads, positions, 1, shape.tokens)
        lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=device)
        last: int | Tensor = shape.tokens - 1
        if rules:
            last = torch.full((), shape.tokens - 1, device=device)
            given = given._replace(positions=torch.arange(positions, device=device).repeat(shape.batch, 1))
        return launches.step_launch(q, k_text, v_text, k_own, v_own, last, given, out, lse, architecture)
    q, do, out = (states(heads, positions, slots) for _ in range(3))
    k, v = states(kv_heads, positions, slots), states(kv_heads, positions, slots)
    lse, delta = torch.zeros(2, *q.shape[:-1], dtype=torch.float32, device=device)
    if kernel == "forward":
        return launches.forward_launch(q, k, v, 1, given, out, lse, architecture)
    if kernel == "query_gradient":
        dq = torch.empty_like(q)
        return launches.query_gradient_launch(do, out, lse, delta, q, k, v, 1, given, dq, architecture)
    dk, dv = torch.empty_like(k)[None], torch.empty_like(v)[None]
    own = kernel == "own_gradient"
    if not own:
        dk, dv = dk[:, :, :, :, :1], dv[:, :, :, :, :1]
    return launches.key_gradient_launch(do, lse, delta, q, k, v, 1, given, dk, dv, own, architecture)


def small_shape(width: int) -> Shape:
    """Of what :func:`errors` compares: several tiles, the last of them not whole."""
    return Shape(width, batch=2, positions=150, tokens=5, heads=6, kv_heads=2)


def errors(kernel: str, dtype: torch.dtype, width: int, device: str) -> tuple[float, float]:
    """Relative errors of the kernel and of the torch backend on a small shape, both against torch in float64."""
    generator = torch.Generator(device).manual_seed(0)
    shape = small_shape(width)
    if kernel in HOPPER_KERNELS:
        shape = shape._replace(heads=8, positions=900)  # groups of a power of two; several tiles for each program

    def random(heads: int) -> Tensor:
        cells = shape.batch, heads, shape.positions, 1 + shape.tokens, width
        return torch.randn(cells, generator=generator, dtype=dtype, device=device)

    q, do, k, v = (random(heads) for heads in (shape.heads, shape.heads, shape.kv_heads, shape.kv_heads))
    kind = kernel.removeprefix("hopper_")
    exact = results(torch_backend, kind, *(x.double() for x in (q, do, k, v)))
    with otherwise_plain(kernel):
        ours = results(triton_backend, kind, q, do, k, v)
    torchs = results(torch_backend, kind, q, do, k, v)
    return distance(ours, exact), distance(torchs, exact)


def results(module: ModuleType, kernel: str, q: Tensor, do: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """What ``module`` makes with the kernel among others."""
    rules = Rules(q.shape[-1] ** -0.5)
    dtype = torch.promote_types(q.dtype, torch.float32)
    if kernel == "step":
        q = q[:, :, :, -1:].contiguous()
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=dtype, device=q.device)
    if kernel == "step":
        text, own = (k[:, :, :, 0], v[:, :, :, 0]), (k[:, :, :, None, 1:], v[:, :, :, None, 1:])
        module.attend_step(q, *text, *own, k.shape[3] - 2, rules, out, lse)
        return [out, lse]
    module.attend(q, k, v, 1, rules, out, lse)
    if kernel == "forward":
        return [out, lse]
    grads = [torch.empty_like(x) for x in (q, k, v)]
    module.attend_backward(do, out, lse, q, k, v, 1, rules, *grads)
    return grads


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error of any."""
    return torch.stack([(x - y).norm() / y.norm() for x, y in zip(found, exact, strict=True)]).max().item()
