"""Gradients of the text's keys and values, for Hopper: as ``key_gradient_kernel`` in ``../triton/backward.py``.

A program has a tile of keys and values, half of it with each consumer, and lets the rows that see them pass by, with
their log-sum-exps and deltas. Scores are transposed, [keys, rows], so that no operand is transposed in memory.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qstar_kernels.common.primitives import LOG2E
from qstar_kernels.thought_attention.gluon.ring import Grid, await_item, fill, make_ring, release, tile_of


class RowNumbers(NamedTuple):
    """Log-sum-exps, in units of log2(e), and deltas of the rows in a ring of row tiles: [places, ROWS] float32."""

    lse: Any
    delta: Any


@gluon.jit
def key_work(grid, splits, KEYS: gl.constexpr, CELLS: gl.constexpr):
    """This program's share of the cells that see its keys: share, pair, first key, first cell, end. Long ones first."""
    share = gl.program_id(0) % splits
    first_key = gl.program_id(0) // splits // grid.pairs * KEYS
    begin = first_key * grid.slots
    size = gl.cdiv(gl.cdiv(grid.cells - begin, CELLS), splits) * CELLS
    begin += share * size
    return share, gl.program_id(0) // splits % grid.pairs, first_key, begin, gl.minimum(begin + size, grid.cells)


@gluon.jit
def produce(
    q, do, k, v, lse, delta, row_ring, key_ring, numbers, grid, splits,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    CELLS: gl.constexpr = ROWS // GROUP
    _, pair, first_key, begin, end = key_work(grid, splits, KEYS, CELLS)
    batch = pair // grid.kv_heads
    head = pair % grid.kv_heads
    for half in gl.static_range(2):
        fill(key_ring, half, k, v, [batch, head, first_key + half * (KEYS // 2), 0])
    rows = gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [1], [0]))
    first_row_head = (batch * grid.kv_heads + head) * GROUP
    for item in range(gl.cdiv(end - begin, CELLS)):
        first_cell = begin + item * CELLS
        fill(row_ring, item, q, do, [batch, first_cell, head * GROUP, 0])
        cell = first_cell + rows // GROUP
        flat = (first_row_head + rows % GROUP).to(gl.int64) * grid.cells + cell
        place = item % row_ring.tiles.shape[0]
        # Beyond the end no weight: exp2(s - inf) = 0.
        numbers.lse.index(place).store(gl.load(lse + flat, cell < end, float("inf")) * LOG2E)
        numbers.delta.index(place).store(gl.load(delta + flat, cell < end, 0.0))
        mbarrier.arrive(row_ring.full.index(place))


@gluon.jit
def pass_by(ring, items):
    """Let the first ``items`` tiles of rows go, which see none of the keys."""
    for item in range(items):
        await_item(ring, item)
        release(ring, item)


@gluon.jit
def add_key_gradients(
    dk, dv, k_tile, v_tile, row_ring, numbers, blind, full, items, begin, first_key, slots, scale,
    ROWS: gl.constexpr, GROUP: gl.constexpr, HALF: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """dk, before the scale, and dv plus what the row tiles blind .. items give; tile 0 is at cell ``begin``.

    From tile ``full`` on every row sees every key.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    for item in range(blind, items):
        place = item % row_ring.tiles.shape[0]
        zeros = gl.zeros([HALF, ROWS], gl.float32, SCORES)
        await_item(row_ring, item)
        q_tile = tile_of(row_ring.tiles, item, ROWS, D)
        do_tile = tile_of(row_ring.mates, item, ROWS, D)
        # dp - delta as one sum, the first product: later there are too few registers, and products in flight.
        dp = zeros - numbers.delta.index(place).load(gl.SliceLayout(0, SCORES))[None, :]
        dp = warpgroup_mma(v_tile, do_tile.permute([1, 0]), dp, is_async=True)
        s = warpgroup_mma(k_tile, q_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
        dp, s = warpgroup_mma_wait(0, [dp, s])
        row_lse = numbers.lse.index(place).load(gl.SliceLayout(0, SCORES))
        p = gl.exp2(s * scale - row_lse[None, :])
        if item < full:
            keys = first_key + gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
            rows = gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
            cell = begin + item * (ROWS // GROUP) + rows // GROUP
            p = gl.where((keys * slots)[:, None] <= cell[None, :], p, 0.0)  # keys <= cell // slots
        ds = gl.convert_layout((p * dp).to(row_ring.tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
        p = gl.convert_layout(p.to(row_ring.tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
        dv = warpgroup_mma(p, do_tile, dv, is_async=True)
        dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
        dv, dk, p, ds = warpgroup_mma_wait(0, [dv, dk, p, ds])
        release(row_ring, item)
    return dk, dv


@gluon.jit
def origin(x, stride, share, batch, head):
    """Where the keys of a share, sequence and head begin; strides [split, B, Hkv, N]."""
    x += gl.cast(share, gl.int64) * stride[0]
    return x + gl.cast(batch, gl.int64) * stride[1] + gl.cast(head, gl.int64) * stride[2]


@gluon.jit
def store_gradient(x, stride, gradient, first_key, positions, HALF: gl.constexpr, D: gl.constexpr):
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    keys = first_key + gl.arange(0, HALF, gl.SliceLayout(1, OUT))
    columns = gl.arange(0, D, gl.SliceLayout(0, OUT))
    offsets = (keys.to(gl.int64) * stride)[:, None] + columns[None, :]
    gl.store(x + offsets, gradient.to(x.dtype.element_ty), (keys < positions)[:, None])


@gluon.jit
def consume(
    half, dk, dv, dk_stride, dv_stride, row_ring, key_ring, numbers, grid, splits, scale,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = KEYS // 2
    CELLS: gl.constexpr = ROWS // GROUP
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    _, _, first_key, begin, end = key_work(grid, splits, KEYS, CELLS)
    first_key += half * HALF
    items = gl.cdiv(end - begin, CELLS)
    blind = gl.minimum(gl.maximum(first_key * grid.slots - begin, 0) // CELLS, items)
    full = gl.cdiv(gl.maximum((first_key + HALF - 1) * grid.slots - begin, 0), CELLS)
    await_item(key_ring, half)
    k_tile = tile_of(key_ring.tiles, half, HALF, D)
    v_tile = tile_of(key_ring.mates, half, HALF, D)
    dk_acc = gl.zeros([HALF, D], gl.float32, OUT)
    dv_acc = gl.zeros([HALF, D], gl.float32, OUT)
    pass_by(row_ring, blind)
    # One loop: of two, where the first is empty, NVIDIA's assembler lets the second read what only the first has set.
    dk_acc, dv_acc = add_key_gradients(
        dk_acc, dv_acc, k_tile, v_tile, row_ring, numbers, blind, full, items, begin, first_key, grid.slots,
        scale * LOG2E, ROWS=ROWS, GROUP=GROUP, HALF=HALF, D=D,
    )  # fmt: skip
    positions = grid.cells // grid.slots
    store_gradient(dk, dk_stride, dk_acc * scale, first_key, positions, HALF, D)
    store_gradient(dv, dv_stride, dv_acc, first_key, positions, HALF, D)


@gluon.jit
def text_gradient_kernel(
    q, do, k, v, lse, delta, dk, dv, dk_stride, dv_stride, splits, pairs, kv_heads, cells, slots, tokens, scale,
    GROUP: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors of q and do [B, N*C, Hq, D] and of the text's k and v [B, Hkv, N, D]; strides [split, B, Hkv, N]."""
    row_ring = make_ring(q, do, PLACES=STAGES, WRITERS=2, READERS=2)  # the copies, and the numbers of the rows
    key_ring = make_ring(k, v, PLACES=2, WRITERS=1, READERS=1)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = RowNumbers(
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], PLAIN),
    )
    fence_async_shared()
    grid = Grid(pairs, pairs, kv_heads, cells, slots, tokens)
    share, pair, _, _, _ = key_work(grid, splits, KEYS, ROWS // GROUP)
    dk = origin(dk, dk_stride, share, pair // kv_heads, pair % kv_heads)
    dv = origin(dv, dv_stride, share, pair // kv_heads, pair % kv_heads)
    gl.warp_specialize(
        [
            (
                consume,
                (0, dk, dv, dk_stride[3], dv_stride[3], row_ring, key_ring, numbers, grid, splits, scale,
                 ROWS, GROUP, KEYS, D),
            ),
            (
                consume,
                (1, dk, dv, dk_stride[3], dv_stride[3], row_ring, key_ring, numbers, grid, splits, scale,
                 ROWS, GROUP, KEYS, D),
            ),
            (
                produce,
                (q, do, k, v, lse, delta, row_ring, key_ring, numbers, grid, splits, ROWS, GROUP, KEYS),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip
