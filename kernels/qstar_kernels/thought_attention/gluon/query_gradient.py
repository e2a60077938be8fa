"""Gradient of the queries, for Hopper: what ``query_gradient_kernel`` in ``../triton/backward.py`` computes.

A program goes from one tile of rows to the next as the Hopper forward does. A tile needs q and the gradient of the
output; delta, the sum of that gradient times the output, is made on the way, for the gradients of the keys as well.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qstar_kernels.common.primitives import LOG2E
from qstar_kernels.thought_attention.gluon.ring import (
    Grid,
    await_item,
    feed_queries,
    make_ring,
    own_cells,
    query_work,
    release,
    tile_of,
    whole_tiles,
)


@gluon.jit
def make_delta(
    do_tile, out, out_stride, delta, batch, head, first_cell, grid, HALF: gl.constexpr, GROUP: gl.constexpr,
    D: gl.constexpr,
):  # fmt: skip
    """The inner products of the rows of do and of out, stored and returned: [HALF] float32."""
    ACROSS: gl.constexpr = min(32, D // 8)  # threads that share a row, 16 bytes each
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    rows = gl.arange(0, HALF, gl.SliceLayout(1, ROWS))
    columns = gl.arange(0, D, gl.SliceLayout(0, ROWS))
    cell = first_cell + rows // GROUP
    row_head = head + rows % GROUP
    offsets = row_head.to(gl.int64) * out_stride[1] + cell.to(gl.int64) * out_stride[2]
    inside = cell < grid.cells
    out_rows = gl.load(
        out + gl.cast(batch, gl.int64) * out_stride[0] + (offsets[:, None] + columns[None, :]), inside[:, None], 0.0
    )
    products = do_tile.load(ROWS).to(gl.float32) * out_rows.to(gl.float32)
    row_delta = gl.sum(products, 1)
    flat = (batch * grid.kv_heads * GROUP + row_head).to(gl.int64) * grid.cells + cell
    gl.store(delta + flat, row_delta, inside)
    return row_delta


@gluon.jit
def add_query_gradient(
    dq, q_tile, do_tile, row_lse, row_delta, ring, item, tiles, whole, start, scale, first, last,
    HALF: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """dq, before the scale, plus what the next ``tiles`` of the ring give; the other words as in the forward."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    for tile in range(tiles):
        zeros = gl.zeros([HALF, KEYS], gl.float32, SCORES)
        await_item(ring, item)
        k_tile = tile_of(ring.tiles, item, KEYS, D)
        s = warpgroup_mma(q_tile, k_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
        v_tile = tile_of(ring.mates, item, KEYS, D)
        dp = warpgroup_mma(do_tile, v_tile.permute([1, 0]), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        p = gl.exp2(s * scale - row_lse[:, None])
        if tile >= whole:
            keys = start + tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
            p = gl.where((keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None]), p, 0.0)
        await_item(ring, item)  # long since full, but a branch: else the assembler waits for dp before it makes p
        dp, p = warpgroup_mma_wait(0, [dp, p])
        ds = p * (dp - row_delta[:, None])
        ds = gl.convert_layout(ds.to(ring.tiles.dtype), gl.DotOperandLayout(0, OUT, 2))
        dq = warpgroup_mma(ds, k_tile, dq)
        release(ring, item)
        item += 1
    return dq, item


@gluon.jit
def consume(
    half, out, lse, delta, dq, out_stride, row_ring, key_ring, works, grid, scale,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, HAS_OWN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = ROWS // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_item = half
    key_item = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        pair, first_cell, own_begin, own_tiles, text_tiles = query_work(work, grid, ROWS // GROUP, KEYS)
        first_cell += half * (HALF // GROUP)
        batch = pair // grid.kv_heads
        head = pair % grid.kv_heads * GROUP
        rows = gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
        cell = first_cell + rows // GROUP
        position = cell // grid.slots
        flat = (batch * grid.kv_heads * GROUP + head + rows % GROUP).to(gl.int64) * grid.cells + cell
        row_lse = gl.load(lse + flat, cell < grid.cells, 0.0) * LOG2E
        await_item(row_ring, row_item)
        q_tile = tile_of(row_ring.tiles, row_item, HALF, D)
        do_tile = tile_of(row_ring.mates, row_item, HALF, D)
        row_delta = make_delta(do_tile, out, out_stride, delta, batch, head, first_cell, grid, HALF, GROUP, D)
        row_delta = gl.convert_layout(row_delta, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([HALF, D], gl.float32, OUT)
        if HAS_OWN:
            first, last = own_cells(cell, grid)
            acc, key_item = add_query_gradient(
                acc, q_tile, do_tile, row_lse, row_delta, key_ring, key_item, own_tiles, 0, own_begin,
                scale * LOG2E, first, last, HALF=HALF, KEYS=KEYS, D=D,
            )  # fmt: skip
        # By now the gradient of the rows before has left its place.
        tma.store_wait(0)
        release(row_ring, row_item - 2, pred=row_item >= 2)
        acc, key_item = add_query_gradient(
            acc, q_tile, do_tile, row_lse, row_delta, key_ring, key_item, text_tiles,
            whole_tiles(first_cell, text_tiles, grid, KEYS), 0, scale * LOG2E, 0 * position, position,
            HALF=HALF, KEYS=KEYS, D=D,
        )  # fmt: skip
        q_tile.store((acc * scale).to(q_tile.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            dq, [batch, first_cell, head, 0], row_ring.tiles.index(row_item % row_ring.tiles.shape[0])
        )
        row_item += 2
    tma.store_wait(0)


@gluon.jit
def query_gradient_kernel(
    q, do, k_grid, v_grid, k_text, v_text, dq, out, lse, delta, out_stride, works, pairs, section, kv_heads, cells,
    slots, tokens, scale,
    GROUP: gl.constexpr, D: gl.constexpr, HAS_OWN: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As the forward, and descriptors of do and dq as that of q; out [B, Hq, N, C, D], lse and delta [B, Hq, N*C]."""
    row_ring = make_ring(q, do, PLACES=4, WRITERS=1, READERS=1)  # two halves, and those of the next rows
    key_ring = make_ring(k_text, v_text, PLACES=STAGES, WRITERS=1, READERS=2)
    fence_async_shared()
    grid = Grid(pairs, section, kv_heads, cells, slots, tokens)
    gl.warp_specialize(
        [
            (
                consume,
                (0, out, lse, delta, dq, out_stride, row_ring, key_ring, works, grid, scale,
                 ROWS, GROUP, KEYS, HAS_OWN, D),
            ),
            (
                consume,
                (1, out, lse, delta, dq, out_stride, row_ring, key_ring, works, grid, scale,
                 ROWS, GROUP, KEYS, HAS_OWN, D),
            ),
            (
                feed_queries,
                (q, do, k_grid, v_grid, k_text, v_text, row_ring, key_ring, works, grid,
                 ROWS, GROUP, KEYS, HAS_OWN),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )  # fmt: skip
