"""Draws from a linear head inside its product: no logits are written, unlike ``sample_linear``'s chunks of them.

1. A tiled product keeps each row's maximum and mass of every 128 columns.
2. They give a row's tile, as they do in ``sample_linear``.
3. Rows that drew the same tile are multiplied with it once more, and each picks a column.

The bits are those of ``sample_linear``, so the tokens are too, but where a uniform falls within rounding of a boundary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qstar_kernels.common.launch import Launch, Tile, run_all
from qstar_kernels.common.primitives import operand
from qstar_kernels.lm_head.logits import TILE
from qstar_kernels.lm_head.triton.draws import signed
from qstar_kernels.lm_head.triton.row_kernels import LOWEST, at_most_zero
from qstar_kernels.lm_head.triton.sample_kernels import (
    count_quanta,
    count_row,
    find_top,
    pick_tile,
    row_uniforms,
    threshold,
)
from qstar_kernels.lm_head.triton.tiles import RowTile

STEP_BYTES = 128  # of a row of hidden or weight that a step of the product takes
ROW_TILES = 8  # neighbouring programs share their columns, and few enough rows to stay in the cache
WEIGH, PICK, DRAW = Tile(128, 2 * TILE, 8, 3), RowTile(1, 512, 4, 1), Tile(64, TILE, 8, 3)


@triton.jit
def multiply_rows(
    hidden, weight, rows, columns, width,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """hidden[rows] weight[columns]^T, ``[ROWS, KEYS]`` float32; ``EVEN``: DEPTH divides the width."""
    inside = tl.arange(0, DEPTH)
    a = hidden + rows.to(tl.int64)[:, None] * width + inside[None, :]
    b = weight + columns.to(tl.int64)[None, :] * width + inside[:, None]
    y = tl.zeros([ROWS, KEYS], tl.float32)
    for start in range(0, width, DEPTH):
        if EVEN:
            x, w = tl.load(a), tl.load(b)
        else:
            left = inside < width - start
            x, w = tl.load(a, mask=left[None, :], other=0.0), tl.load(b, mask=left[:, None], other=0.0)
        y = tl.dot(operand(x), operand(w), acc=y, input_precision=PRECISION)
        a += DEPTH
        b += DEPTH
    return y


@triton.jit
def weigh_product_kernel(
    hidden, weight, tops, masses, count, vocabulary, tiles, width,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr, BAND: tl.constexpr, TILE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """hidden [R, E], weight [V, E] -> what ``weigh_tiles_kernel`` finds of their logits, tops and masses [R, tiles]."""
    program = tl.program_id(0)
    in_band = BAND * tl.cdiv(vocabulary, KEYS)
    first = program // in_band * BAND
    height = tl.minimum(tl.cdiv(count, ROWS) - first, BAND)
    rows = (first + program % in_band % height) * ROWS + tl.arange(0, ROWS)
    start = program % in_band // height * KEYS
    columns = start + tl.arange(0, KEYS)

    clamped = tl.minimum(rows, count - 1), tl.minimum(columns, vocabulary - 1)
    y = multiply_rows(hidden, weight, clamped[0], clamped[1], width, PRECISION, EVEN, DEPTH, ROWS, KEYS)
    y = tl.where((columns < vocabulary)[None, :], y, LOWEST)
    y = tl.reshape(y, [ROWS, KEYS // TILE, TILE])
    top = tl.max(y, 2)
    tile = start // TILE + tl.arange(0, KEYS // TILE)
    cells = rows.to(tl.int64)[:, None] * tiles + tile[None, :]
    inside = (rows < count)[:, None] & (tile < tiles)[None, :]
    tl.store(tops + cells, top, mask=inside)
    tl.store(masses + cells, tl.sum(count_quanta(y - top[:, :, None]), 2), mask=inside)


@triton.jit(do_not_specialize=["seed", "step", "first_row"])
def pick_tile_kernel(
    tops, masses, picked, uniforms, row_tops, log_totals, tiles, unit, seed, step, first_row, COLUMNS: tl.constexpr
):
    """Each row's tile, its uniform for a column of it, and the maximum and log-mass of the row, all [R]."""
    row = tl.cast(tl.program_id(0), tl.int64)
    tops += row * tiles
    masses += row * tiles
    row_top = find_top(tops, tiles, COLUMNS)
    total = count_row(tops, masses, tiles, row_top, 1.0, unit, COLUMNS)

    tile_uniform, column_uniform = row_uniforms(
        tl.cast(seed, tl.int64), tl.cast(step, tl.int64), tl.cast(first_row, tl.int64) + row
    )
    drawn = threshold(tile_uniform, total)
    tl.store(picked + row, pick_tile(tops, masses, tiles, row_top, 1.0, unit, drawn, COLUMNS))
    tl.store(uniforms + row, column_uniform)
    tl.store(row_tops + row, row_top)
    tl.store(log_totals + row, tl.log((total.to(tl.float64) * (1.0 / unit)).to(tl.float32)))


@triton.jit
def draw_column_kernel(
    hidden, weight, order, owners, firsts, ends, uniforms, row_tops, log_totals, tokens, log_prob, vocabulary, width,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of rows of one tile, ``order[first : end]`` -> their tokens and log_prob."""
    tile = tl.load(owners + tl.program_id(0))
    first, end = tl.load(firsts + tl.program_id(0)), tl.load(ends + tile)
    if first >= end:
        return
    place = first + tl.arange(0, ROWS)
    inside = place < end
    rows = tl.load(order + tl.minimum(place, end - 1))
    columns = tile * KEYS + tl.arange(0, KEYS)
    clamped = tl.minimum(columns, vocabulary - 1)
    y = multiply_rows(hidden, weight, rows, clamped, width, PRECISION, EVEN, DEPTH, ROWS, KEYS)
    y = tl.where((columns < vocabulary)[None, :], y, LOWEST)

    counts = count_quanta(y - tl.max(y, 1)[:, None])
    drawn = threshold(tl.load(uniforms + rows), tl.sum(counts, 1))
    column = tl.minimum(tl.sum((tl.cumsum(counts, 1) <= drawn[:, None]).to(tl.int32), 1), KEYS - 1)
    token = tl.minimum(tile * KEYS + column, vocabulary - 1)
    own = tl.sum(tl.where(columns[None, :] == token[:, None], y, 0.0), 1)
    tl.store(tokens + rows, token, mask=inside)
    tl.store(log_prob + rows, at_most_zero(own - tl.load(row_tops + rows)) - tl.load(log_totals + rows), mask=inside)


def blocks_of_rows(picked: Tensor, tiles: int) -> dict[str, Tensor]:
    """Blocks of rows of one tile: as many as there can be, so that the host need not know how many there are."""
    ordered, order = picked.sort(stable=True)
    ends = torch.searchsorted(ordered, torch.arange(tiles, device=picked.device), right=True)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    blocks = (ends - starts + DRAW.rows - 1) // DRAW.rows
    block_ends = blocks.cumsum(0)
    block = torch.arange(len(picked) // DRAW.rows + min(len(picked), tiles), device=picked.device)
    owners = torch.searchsorted(block_ends, block, right=True).clamp_(max=tiles - 1)
    firsts = starts[owners] + (block - (block_ends - blocks)[owners]) * DRAW.rows
    return {"order": order, "owners": owners, "firsts": firsts, "ends": ends}


def sample_in_epilogue(
    hidden: Tensor, weight: Tensor, *, seed: int, step: int = 0, row_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """tokens and log_prob ``[R]`` of hidden ``[R, E]`` and weight ``[V, E]``, as of ``sample_linear``."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not x.is_contiguous():
            raise ValueError(f"{name} has strides {x.stride()}, but it must be contiguous")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    (rows, width), vocabulary = hidden.shape, len(weight)
    tiles, depth = -(-vocabulary // TILE), STEP_BYTES // hidden.element_size()
    heads = {"hidden": hidden, "weight": weight, "vocabulary": vocabulary, "width": width}
    product = heads | {"PRECISION": "ieee", "EVEN": width % depth == 0, "DEPTH": depth}
    masses = {"tops": empty(rows, tiles), "masses": empty(rows, tiles, dtype=torch.int64), "tiles": tiles}
    found = {"uniforms": empty(rows, dtype=torch.float64), "row_tops": empty(rows), "log_totals": empty(rows)}
    picked, tokens = (empty(rows, dtype=torch.int64) for _ in range(2))
    results = {"tokens": tokens, "log_prob": empty(rows)}

    programs = -(-rows // WEIGH.rows) * -(-vocabulary // WEIGH.keys)
    weigh = product | masses | {"count": rows, "BAND": ROW_TILES, "TILE": TILE}
    bits = {"seed": signed(seed), "step": signed(step), "first_row": row_offset}
    pick = masses | found | bits | {"picked": picked, "unit": 2.0 ** (62 - vocabulary.bit_length())}
    run_all([Launch(weigh_product_kernel, programs, weigh, WEIGH), Launch(pick_tile_kernel, rows, pick, PICK)], hidden)
    blocks = blocks_of_rows(picked, tiles)
    draw = product | found | blocks | results
    run_all([Launch(draw_column_kernel, len(blocks["owners"]), draw, DRAW)], hidden)
    return tokens, results["log_prob"]
