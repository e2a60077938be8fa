"""Launches of the Hopper kernels, and which calls they serve: what remains goes to the kernels in plain Triton.

They are written for the copy engine and the asynchronous products of compute capability 9.0, for 16-bit rows of one of
a few widths, and know no window, soft-cap, sinks or ``text_start``. A kernel is used where the table of tiles has one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qstar_kernels.common.launch import Tile
from qstar_kernels.thought_attention.gluon.forward import forward_kernel
from qstar_kernels.thought_attention.gluon.launch import GluonLaunch
from qstar_kernels.thought_attention.gluon.query_gradient import query_gradient_kernel
from qstar_kernels.thought_attention.gluon.text_gradient import text_gradient_kernel
from qstar_kernels.thought_attention.rules import Rules

# What tuning tries, {kernel: {width: tiles}}: rows, keys, the warps of a consumer, the places in a ring of tiles.
TILES = {
    "hopper_forward": {
        64: [Tile(128, 64, 4, 4), Tile(128, 128, 4, 3)],
        128: [Tile(128, 64, 4, 4), Tile(128, 64, 4, 5), Tile(128, 128, 4, 2)],
        256: [Tile(128, 32, 4, 2), Tile(128, 32, 4, 3)],
    },
    "hopper_query_gradient": {
        64: [Tile(128, 64, 4, 4), Tile(128, 128, 4, 3)],
        128: [Tile(128, 64, 4, 3), Tile(128, 64, 4, 2)],
    },
    "hopper_text_gradient": {
        64: [Tile(64, 128, 4, 4), Tile(128, 128, 4, 3)],
        128: [Tile(64, 128, 4, 4), Tile(64, 128, 4, 3)],
    },
}
ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
ALIGNMENT = 16  # bytes, of all that the copy engine is told
LEAST_SCALE = 2.0**-100  # which multiplies what is masked: 0 times -inf is NaN
SECTION = 2**24  # bytes of the text's keys and values that programs walk over at one time, for the L2 cache
MOST_HEADS = 64  # of a group: rows of the smallest tile
PROCESSORS = 132  # of a card that is not there


def serves(rules: Rules, group: int, *states: Tensor) -> bool:
    """Whether the kernels can take these rules and q, k, v or their like [B, H, N, C, D]."""
    if any(x is not None for x in (rules.window, rules.softcap, rules.sinks, rules.text_start)):
        return False
    if not rules.scale >= LEAST_SCALE:
        return False
    if group > MOST_HEADS or group & (group - 1) or len({x.shape[-1] for x in states}) > 1:
        return False
    return all(x.dtype.itemsize == 2 and copyable(x) for x in states)


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can walk over the cells of x [B, H, N, C, D] and over its texts."""
    batch, heads, positions, slots, _ = x.shape
    strides = [stride for size, stride in zip(x.shape, x.stride()[:4], strict=False) if size > 1]
    if positions > 1 and slots > 1 and x.stride(2) != slots * x.stride(3):
        return False
    aligned = all(stride > 0 and stride * x.itemsize % ALIGNMENT == 0 for stride in strides)
    return aligned and x.data_ptr() % ALIGNMENT == 0 and batch * heads * positions * slots < 2**31


def describe(x: Tensor, dims: list[tuple[int, int]], box: list[int]) -> TensorDescriptor:
    """What the copy engine is told: boxes of x, whose dimensions have these sizes and strides and then its rows."""
    width = x.shape[-1]
    shape, strides = [size for size, _ in dims], [stride if size > 1 else width for size, stride in dims]
    return TensorDescriptor(x, [*shape, width], [*strides, 1], [*box, width], layout_of((*box, width), x.dtype))


@cache
def layout_of(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a box in shared memory; kept, since to find it takes longer than all else in a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(box), ELEMENTS[dtype])


def row_tiles(x: Tensor, rows: int, group: int) -> TensorDescriptor:
    """Of q or its like: boxes of the rows of a group's heads at neighbouring cells."""
    batch, heads, positions, slots, _ = x.shape
    dims = [(batch, x.stride(0)), (positions * slots, cell_stride(x)), (heads, x.stride(1))]
    return describe(x, dims, [1, rows // group, group])


def cell_tiles(x: Tensor, keys: int) -> TensorDescriptor:
    """Of k or v: boxes of a head's rows at neighbouring cells, text and thoughts."""
    batch, heads, positions, slots, _ = x.shape
    dims = [(batch, x.stride(0)), (heads, x.stride(1)), (positions * slots, cell_stride(x))]
    return describe(x, dims, [1, 1, keys])


def text_tiles(x: Tensor, keys: int) -> TensorDescriptor:
    """Of k or v: boxes of a head's rows at neighbouring positions, text alone."""
    batch, heads, positions, _, _ = x.shape
    return describe(x, [(batch, x.stride(0)), (heads, x.stride(1)), (positions, x.stride(2))], [1, 1, keys])


def cell_stride(x: Tensor) -> int:
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def grid_arguments(q: Tensor, k: Tensor, rationales: int, rules: Rules, tile: Tile) -> dict:
    """What the kernels share."""
    batch, heads, positions, slots, width = q.shape
    kv_heads = k.shape[1]
    return {
        "pairs": batch * kv_heads,
        "kv_heads": kv_heads,
        "cells": positions * slots,
        "slots": slots,
        "tokens": max((slots - 1) // rationales, 1),
        "scale": rules.scale,
        "GROUP": heads // kv_heads,
        "D": width,
        "STAGES": tile.stages,
    }


def section(k: Tensor) -> int:
    """How many pairs of a sequence and a key/value head are worked on together."""
    batch, kv_heads, positions, _, width = k.shape
    return max(1, min(batch * kv_heads, SECTION // (2 * positions * width * k.itemsize)))


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS


def launch_by_rows(kernel, q, k, v, rationales: int, rules: Rules, tile: Tile, rows: dict, others: dict) -> GluonLaunch:
    """Of a kernel whose programs go from one tile of rows to the next; ``rows`` are like q, and tiled as it is."""
    shared = grid_arguments(q, k, rationales, rules, tile)
    works = -(-shared["cells"] * shared["GROUP"] // tile.rows) * shared["pairs"]
    arguments = {
        "k_grid": cell_tiles(k, tile.keys),
        "v_grid": cell_tiles(v, tile.keys),
        "k_text": text_tiles(k, tile.keys),
        "v_text": text_tiles(v, tile.keys),
        "works": works,
        "section": section(k),
        "HAS_OWN": q.shape[3] > 1,
    }
    tiled = {name: row_tiles(x, tile.rows // 2, shared["GROUP"]) for name, x in ({"q": q} | rows).items()}
    return GluonLaunch(kernel, min(works, processors(q.device)), shared | arguments | tiled | others, tile)


def forward_launch(q, k, v, rationales: int, rules: Rules, out: Tensor, lse: Tensor, tile: Tile) -> GluonLaunch:
    return launch_by_rows(forward_kernel, q, k, v, rationales, rules, tile, {"out": out}, {"lse": lse})


def query_gradient_launch(
    do, out, lse, delta, q, k, v, rationales: int, rules: Rules, dq: Tensor, tile: Tile
) -> GluonLaunch:
    out_stride = out.stride(0), out.stride(1), cell_stride(out)
    others = {"out": out, "out_stride": out_stride, "lse": lse, "delta": delta}
    return launch_by_rows(query_gradient_kernel, q, k, v, rationales, rules, tile, {"do": do, "dq": dq}, others)


def text_gradient_launch(
    do, lse, delta, q, k, v, rationales: int, rules: Rules, dk: Tensor, dv: Tensor, tile: Tile
) -> GluonLaunch:
    """dk and dv [splits, B, Hkv, N, 1, D] of the text keys."""
    shared = grid_arguments(q, k, rationales, rules, tile)
    splits = dk.shape[0]
    arguments = {
        "q": row_tiles(q, tile.rows, shared["GROUP"]),
        "do": row_tiles(do, tile.rows, shared["GROUP"]),
        "k": text_tiles(k, tile.keys // 2),
        "v": text_tiles(v, tile.keys // 2),
        "lse": lse,
        "delta": delta,
        "dk": dk,
        "dv": dv,
        "dk_stride": dk.stride()[:4],
        "dv_stride": dv.stride()[:4],
        "splits": splits,
    }
    programs = -(-q.shape[2] // tile.keys) * shared["pairs"] * splits
    return GluonLaunch(text_gradient_kernel, programs, shared | arguments, tile)
