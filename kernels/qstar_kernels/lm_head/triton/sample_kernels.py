"""Draws from rows of logits in two stages: tiles of 128 columns are weighed, then a tile and a column of it are drawn.

Masses are counted in whole quanta, so that their sums, and with them the draws, do not depend on the order of addition.
Only the first kernel reads all logits; a product that weighs its own tiles could take its place.
"""

import triton
import triton.language as tl

from qstar_kernels.lm_head.triton.row_kernels import LOWEST, at_most_zero, load_logits

QUANTA = tl.constexpr(2.0**55)  # in a mass of 1: a tile has less than 2^63, a token 38 below its top has one


@triton.jit
def count_quanta(x):
    """exp(x) in quanta, for x at most 0."""
    return (tl.exp(x) * QUANTA).to(tl.int64)


@triton.jit
def weigh_tiles_kernel(
    logits, bias, tops, masses, draw_masses, vocabulary, width, tiles, gain, cap, ratio,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """logits [R, V] -> each tile's maximum and its mass relative to that, [R, tiles].

    Masses are at the log-probabilities' temperature; draw_masses, if any, are at that of the draws: y times ``ratio``.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    logits += row * width
    rows: tl.constexpr = COLUMNS // TILE
    for start in range(0, vocabulary, COLUMNS):
        columns = start + tl.arange(0, rows)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        y = load_logits(logits, bias, columns, vocabulary, width, gain, cap)
        top = tl.max(y, 1)
        x = y - top[:, None]
        tile = start // TILE + tl.arange(0, rows)
        inside = tile < tiles
        tl.store(tops + row * tiles + tile, top, mask=inside)
        tl.store(masses + row * tiles + tile, tl.sum(count_quanta(x), 1), mask=inside)
        if draw_masses is not None:
            tl.store(draw_masses + row * tiles + tile, tl.sum(count_quanta(x * ratio), 1), mask=inside)


@triton.jit
def load_counts(tops, masses, tile, tiles, row_top, ratio, unit):
    """The tiles' masses relative to the row's maximum, in ``unit`` quanta each."""
    inside = tile < tiles
    top = tl.load(tops + tile, mask=inside, other=LOWEST)
    mass = tl.load(masses + tile, mask=inside, other=0)
    share = tl.exp((top - row_top) * ratio).to(tl.float64)
    return (mass.to(tl.float64) * share * (unit / QUANTA)).to(tl.int64)


@triton.jit
def count_row(tops, masses, tiles, row_top, ratio, unit, COLUMNS: tl.constexpr):
    counts = tl.zeros([COLUMNS], tl.int64)
    for start in range(0, tiles, COLUMNS):
        counts += load_counts(tops, masses, start + tl.arange(0, COLUMNS), tiles, row_top, ratio, unit)
    return tl.sum(counts, 0)


@triton.jit
def find_top(tops, tiles, COLUMNS: tl.constexpr):
    """The maximum of a row."""
    lanes = tl.arange(0, COLUMNS)
    highest = tl.full([COLUMNS], LOWEST, tl.float32)
    for start in range(0, tiles, COLUMNS):
        highest = tl.maximum(highest, tl.load(tops + start + lanes, mask=start + lanes < tiles, other=LOWEST))
    return tl.max(highest, 0)


@triton.jit
def pick_tile(tops, masses, tiles, row_top, ratio, unit, drawn, COLUMNS: tl.constexpr):
    """The first tile of a row with more than ``drawn`` in it and all before it."""
    lanes = tl.arange(0, COLUMNS)
    tile = 0
    before = tl.full([], 0, tl.int64)
    for start in range(0, tiles, COLUMNS):
        counts = load_counts(tops, masses, start + lanes, tiles, row_top, ratio, unit)
        tile += tl.sum((before + tl.cumsum(counts, 0) <= drawn).to(tl.int32), 0)
        before += tl.sum(counts, 0)
    return tl.minimum(tile, tiles - 1)


@triton.jit
def uniform(high, low):
    """A multiple of 2^-53 on [0, 1) of two words of 32 bits."""
    return ((tl.cast(high, tl.int64) << 21) | (tl.cast(low, tl.int64) >> 11)).to(tl.float64) * (2.0**-53)


@triton.jit
def row_uniforms(seed, step, row):
    """As ``random_bits.row_uniforms``, of which it is the twin."""
    c0, c1 = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    c2, c3 = step.to(tl.uint32), (step >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    return uniform(w0, w1), uniform(w2, w3)


@triton.jit
def threshold(u, total):
    """The first item drawn is the first with more than this in it and all before it."""
    return tl.minimum((u * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit(do_not_specialize=["seed", "step", "rows"])
def draw_kernel(
    logits, bias, tops, masses, draw_masses, tokens, log_prob, vocabulary, width, tiles, gain, cap, ratio,
    unit, seed, step, rows,
    GREEDY: tl.constexpr, SEED_IN_MEMORY: tl.constexpr, STEP_IN_MEMORY: tl.constexpr, ROWS_IN_MEMORY: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What :func:`weigh_tiles_kernel` found of logits [R, V] -> tokens [R], log_prob [R].

    ``rows`` is the number of the first row, or in memory those of all.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    lanes = tl.arange(0, COLUMNS)
    logits += row * width
    tops += row * tiles
    masses += row * tiles
    if draw_masses is None:
        draw_masses = masses
    else:
        draw_masses += row * tiles

    row_top = find_top(tops, tiles, COLUMNS)
    total = count_row(tops, masses, tiles, row_top, 1.0, unit, COLUMNS)

    inside = tl.arange(0, TILE)
    if GREEDY:
        first = tl.full([COLUMNS], 0, tl.int32) + tiles
        for start in range(0, tiles, COLUMNS):
            is_top = tl.load(tops + start + lanes, mask=start + lanes < tiles, other=LOWEST) == row_top
            first = tl.minimum(first, tl.where(is_top, start + lanes, tiles))
        tile = tl.minimum(tl.min(first, 0), tiles - 1)
        y = load_logits(logits, bias, tile * TILE + inside, vocabulary, width, gain, cap)
        column = tl.min(tl.where(y == tl.max(y, 0), inside, TILE - 1), 0)
    else:
        if SEED_IN_MEMORY:
            seed = tl.load(seed)
        if STEP_IN_MEMORY:
            step = tl.load(step)
        if ROWS_IN_MEMORY:
            number = tl.load(rows + row)
        else:
            number = tl.cast(rows, tl.int64) + row
        tile_uniform, column_uniform = row_uniforms(tl.cast(seed, tl.int64), tl.cast(step, tl.int64), number)
        drawn = threshold(tile_uniform, count_row(tops, draw_masses, tiles, row_top, ratio, unit, COLUMNS))
        tile = pick_tile(tops, draw_masses, tiles, row_top, ratio, unit, drawn, COLUMNS)
        y = load_logits(logits, bias, tile * TILE + inside, vocabulary, width, gain, cap)
        counts = count_quanta((y - tl.max(y, 0)) * ratio)
        drawn = threshold(column_uniform, tl.sum(counts, 0))
        column = tl.minimum(tl.sum((tl.cumsum(counts, 0) <= drawn).to(tl.int32), 0), TILE - 1)

    token = tl.minimum(tile * TILE + column, vocabulary - 1)
    y = load_logits(logits, bias, token, vocabulary, width, gain, cap)
    log_total = tl.log((total.to(tl.float64) * (1.0 / unit)).to(tl.float32))
    tl.store(tokens + row, tl.cast(token, tl.int64))
    tl.store(log_prob + row, at_most_zero(y - row_top) - log_total)
