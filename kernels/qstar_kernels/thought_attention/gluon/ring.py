"""Words that the Hopper kernels share: rings of tiles in shared memory, and the tiles that some rows need.

One warp, the producer, asks the copy engine for tiles; two warpgroups of 128 threads, the consumers, multiply them.
A ring has a few places for tiles. Item n of a ring lies in place ``n % places``; the parity of ``n // places`` tells
a barrier's uses apart. Rows are (cell, query head of the group), the head fastest; cell ``i * slots + c`` is slot c of
position i. Gluon is Triton's own lower level: the layouts, copies and barriers are spelled out here.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


class Ring(NamedTuple):
    """Tiles [places, ...] in shared memory and their mates; for each place a barrier: full, free to be filled.

    Tiles that have no mates are their own.
    """

    tiles: Any
    mates: Any
    full: Any
    empty: Any


class Grid(NamedTuple):
    """The thought grid: pairs of a sequence and one of its kv_heads key/value heads, each of ``cells`` cells.

    ``section`` pairs are worked on together, so that their keys and values stay in the L2 cache.
    """

    pairs: Any
    section: Any
    kv_heads: Any
    cells: Any
    slots: Any
    tokens: Any


@gluon.jit
def make_ring(descriptor, mate, PLACES: gl.constexpr, WRITERS: gl.constexpr, READERS: gl.constexpr):
    """A ring for what the descriptors copy; WRITERS fill a place together, READERS have to let it go."""
    shape: gl.constexpr = [PLACES] + descriptor.block_type.shape  # noqa: RUF005, since Triton knows no star
    tiles = gl.allocate_shared_memory(descriptor.dtype, shape, descriptor.layout)
    mates = tiles
    if mate is not None:
        mates = gl.allocate_shared_memory(mate.dtype, shape, mate.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=WRITERS)
        mbarrier.init(empty.index(place), count=READERS)
    return Ring(tiles, mates, full, empty)


@gluon.jit
def fill(ring, item, descriptor, mate, at):
    """Copy the tiles ``at`` in the descriptors' tensors into the ring as soon as their place is free."""
    PLACES: gl.constexpr = ring.tiles.shape[0]
    place = item % PLACES
    full = ring.full.index(place)
    mbarrier.wait(ring.empty.index(place), (item // PLACES & 1) ^ 1)
    if mate is None:
        mbarrier.expect(full, descriptor.block_type.nbytes)
    else:
        mbarrier.expect(full, 2 * descriptor.block_type.nbytes)
        tma.async_copy_global_to_shared(mate, at, full, ring.mates.index(place))
    tma.async_copy_global_to_shared(descriptor, at, full, ring.tiles.index(place))


@gluon.jit
def await_item(ring, item):
    """Wait until the place of ``item`` is full."""
    PLACES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.full.index(item % PLACES), item // PLACES & 1)


@gluon.jit
def tile_of(tiles, item, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """The tile of ``item``, [ROWS, WIDTH] in shared memory, among a ring's tiles or their mates."""
    PLACES: gl.constexpr = tiles.shape[0]
    return tiles.index(item % PLACES).reshape([ROWS, WIDTH])


@gluon.jit
def release(ring, item, pred=True):
    """Let the place of ``item`` be filled again; what this warpgroup read there it has read."""
    PLACES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.arrive(ring.empty.index(item % PLACES), pred=pred)


@gluon.jit
def query_work(work, grid, CELLS: gl.constexpr, KEYS: gl.constexpr):
    """Which CELLS cells of which pair of sequence and key/value head are number ``work``, and what they need.

    Returns the pair, the first cell, the first cell that may hold own keys of theirs, and the tiles of KEYS own keys
    and of KEYS text keys that they meet. Of a section's works those with the most keys come first.
    """
    tiles = gl.cdiv(grid.cells, CELLS)
    first_pair = work // (tiles * grid.section) * grid.section
    together = gl.minimum(grid.section, grid.pairs - first_pair)
    inside = work - first_pair * tiles
    pair = first_pair + inside % together
    first = (tiles - 1 - inside // together) * CELLS
    last = gl.minimum(first + CELLS, grid.cells) - 1
    own_begin = first - gl.maximum(first % grid.slots - 1, 0) % grid.tokens
    own_tiles = gl.cdiv(last + 1 - own_begin, KEYS)
    return pair, first, own_begin, own_tiles, gl.cdiv(last // grid.slots + 1, KEYS)


@gluon.jit
def fill_keys(ring, item, k, v, batch, head, tiles, start, KEYS: gl.constexpr):
    """Copy ``tiles`` tiles of keys and values from ``start`` on; returns the next item."""
    for tile in range(tiles):
        fill(ring, item, k, v, [batch, head, start + tile * KEYS, 0])
        item += 1
    return item


@gluon.jit
def own_cells(cell, grid):
    """First and last cell whose keys a row of ``cell`` sees among the thoughts; text rows have none."""
    slot = cell % grid.slots
    return cell - gl.maximum(slot - 1, 0) % grid.tokens, gl.where(slot > 0, cell, -1)


@gluon.jit
def whole_tiles(first_cell, text_tiles, grid, KEYS: gl.constexpr):
    """How many of the text's tiles every row from ``first_cell`` on sees whole."""
    return gl.minimum((first_cell // grid.slots + 1) // KEYS, text_tiles)


@gluon.jit
def feed_queries(
    q, do, k_grid, v_grid, k_text, v_text, row_ring, key_ring, works, grid,
    ROWS: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, HAS_OWN: gl.constexpr,
):  # fmt: skip
    """The producer of what goes by tiles of rows: q, and do unless that is None, then the keys that they meet."""
    HALF: gl.constexpr = ROWS // 2 // GROUP
    row_item = 0
    key_item = 0
    for work in range(gl.program_id(0), works, gl.num_programs(0)):
        pair, first_cell, own_begin, own_tiles, text_tiles = query_work(work, grid, 2 * HALF, KEYS)
        batch = pair // grid.kv_heads
        head = pair % grid.kv_heads
        for half in gl.static_range(2):
            fill(row_ring, row_item + half, q, do, [batch, first_cell + half * HALF, head * GROUP, 0])
        row_item += 2
        if HAS_OWN:
            key_item = fill_keys(key_ring, key_item, k_grid, v_grid, batch, head, own_tiles, own_begin, KEYS)
        key_item = fill_keys(key_ring, key_item, k_text, v_text, batch, head, text_tiles, 0, KEYS)
