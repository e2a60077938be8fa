"""Packed thought attention, forward, for Hopper: what ``forward_kernel`` in ``../triton/forward.py`` computes.

A program stays on its processor and takes one tile of rows after the other. Of its two consumers each has half of the
rows; while one makes its exponentials the other has the tensor cores. Rows wait in shared memory before their turn, and
their output leaves through the same place.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma

from qstar_kernels.common.primitives import LN2, LOG2E
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
def attend(
    acc, total, top, q_tile, ring, item, tiles, whole, start, scale, first, last,
    HALF: gl.constexpr, KEYS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Rows q over the next ``tiles`` of the ring of keys and values; the first holds the keys from ``start`` on.

    Of all tiles but the first ``whole`` a row sees only the keys from its ``first`` to its ``last``; ``scale`` in units
    of log2(e). There is at least one tile: see :func:`consume`.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    for tile in range(tiles):
        await_item(ring, item)
        s = gl.zeros([HALF, KEYS], gl.float32, SCORES)
        s = warpgroup_mma(q_tile, tile_of(ring.tiles, item, KEYS, D).permute([1, 0]), s, use_acc=False)
        if tile >= whole:
            keys = start + tile * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
            s = gl.where((keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None]), s, float("-inf"))
        new_top = gl.maximum(top, gl.max(s, 1) * scale)
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        p = gl.exp2(s * scale - shift[:, None])
        shrink = gl.exp2(top - shift)
        total = total * shrink + gl.sum(p, 1)
        top = new_top
        acc *= gl.convert_layout(shrink, gl.SliceLayout(1, OUT))[:, None]
        p = gl.convert_layout(p.to(ring.mates.dtype), gl.DotOperandLayout(0, OUT, 2))
        acc = warpgroup_mma(p, tile_of(ring.mates, item, KEYS, D), acc)
        release(ring, item)
        item += 1
    return acc, total, top, item


@gluon.jit
def consume(
    half, out, lse, row_ring, key_ring, works, grid, scale,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, HAS_OWN: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Every loop over keys has a tile: where the first could have none, NVIDIA's assembler lets the next one read
    descriptors of the rows that only the first would have set.
    """
    HALF: gl.constexpr = ROWS // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_item = half
    key_item = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        pair, first_cell, own_begin, own_tiles, text_tiles = query_work(work, grid, ROWS // GROUP, KEYS)
        first_cell += half * (HALF // GROUP)
        rows = gl.arange(0, HALF, gl.SliceLayout(1, SCORES))
        cell = first_cell + rows // GROUP
        position = cell // grid.slots
        acc = gl.zeros([HALF, D], gl.float32, OUT)
        total = gl.zeros([HALF], gl.float32, gl.SliceLayout(1, SCORES))
        top = gl.full([HALF], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        await_item(row_ring, row_item)
        q_tile = tile_of(row_ring.tiles, row_item, HALF, D)
        if HAS_OWN:
            first, last = own_cells(cell, grid)
            acc, total, top, key_item = attend(
                acc, total, top, q_tile, key_ring, key_item, own_tiles, 0, own_begin, scale, first, last,
                HALF=HALF, KEYS=KEYS, D=D,
            )  # fmt: skip
        # By now the output of the rows before has left its place.
        tma.store_wait(0)
        release(row_ring, row_item - 2, pred=row_item >= 2)
        acc, total, top, key_item = attend(
            acc, total, top, q_tile, key_ring, key_item, text_tiles, whole_tiles(first_cell, text_tiles, grid, KEYS), 0,
            scale, 0 * position, position, HALF=HALF, KEYS=KEYS, D=D,
        )  # fmt: skip

        batch = pair // grid.kv_heads
        head = pair % grid.kv_heads * GROUP
        acc *= gl.convert_layout(1.0 / total, gl.SliceLayout(1, OUT))[:, None]
        q_tile.store(acc.to(q_tile.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(
            out, [batch, first_cell, head, 0], row_ring.tiles.index(row_item % row_ring.tiles.shape[0])
        )
        lse_rows = (batch * grid.kv_heads * GROUP + head + rows % GROUP).to(gl.int64) * grid.cells + cell
        gl.store(lse + lse_rows, (top + gl.log2(total)) * LN2, mask=cell < grid.cells)
        row_item += 2
    tma.store_wait(0)


@gluon.jit
def forward_kernel(
    q, k_grid, v_grid, k_text, v_text, out, lse, works, pairs, section, kv_heads, cells, slots, tokens, scale,
    GROUP: gl.constexpr, D: gl.constexpr, HAS_OWN: gl.constexpr,
    ROWS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors of q and out [B, N*C, Hq, D], of k and v [B, Hkv, N*C, D] and [B, Hkv, N, D]; lse [B, Hq, N*C]."""
    row_ring = make_ring(q, None, PLACES=4, WRITERS=1, READERS=1)  # two halves, and those of the next rows
    key_ring = make_ring(k_text, v_text, PLACES=STAGES, WRITERS=1, READERS=2)
    fence_async_shared()
    grid = Grid(pairs, section, kv_heads, cells, slots, tokens)
    scale *= LOG2E
    gl.warp_specialize(
        [
            (consume, (0, out, lse, row_ring, key_ring, works, grid, scale, ROWS, GROUP, KEYS, HAS_OWN, D)),
            (consume, (1, out, lse, row_ring, key_ring, works, grid, scale, ROWS, GROUP, KEYS, HAS_OWN, D)),
            (
                feed_queries,
                (q, None, k_grid, v_grid, k_text, v_text, row_ring, key_ring, works, grid, ROWS, GROUP, KEYS, HAS_OWN),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )
