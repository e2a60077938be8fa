"""Packed thought attention, forward: a program takes a tile of rows over their own keys, then over the text keys."""

import triton
import triton.language as tl

from qstar_kernels.common.primitives import LN2, LOG2E, add_product, load_rows, scale_rows, store_rows, zero_rows
from qstar_kernels.thought_attention.triton.visible import (
    decode_rows,
    key_offsets,
    key_origin,
    own_interval,
    own_range,
    scores,
    text_interval,
    text_ranges,
)


@triton.jit
def add_scores(acc, total, top, s, v, PRECISION: tl.constexpr):
    """One step of the online softmax: scores s [M, N] of values v [N, W] join acc, total and top, the maximum."""
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(top - shift)
    return add_product(scale_rows(acc, shrink), p, v, PRECISION), total * shrink + tl.sum(p, 1), new_top


@triton.jit
def attend(
    acc, total, top, q, k, v, k_stride, v_stride, begin, end, count, first, last, slots, scale, softcap,
    OWN: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows q over the keys begin .. end; masked, over those between ``first [M]`` and ``last [M]``."""
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = tl.minimum(keys, count - 1) if MASKED else keys
        k_tile = load_rows(
            k + key_origin(start, slots, k_stride, OWN), key_offsets(inside, start, slots, k_stride, OWN), D
        )
        s = scores(q, k_tile, scale, softcap, PRECISION)
        if MASKED:
            s = tl.where((keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None]), s, float("-inf"))
        v_tile = load_rows(
            v + key_origin(start, slots, v_stride, OWN), key_offsets(inside, start, slots, v_stride, OWN), DV
        )
        acc, total, top = add_scores(acc, total, top, s, v_tile, PRECISION)
    return acc, total, top


@triton.jit
def attend_text(
    acc, total, top, q, k, v, k_stride, v_stride, first_position, last_position, first, last, positions,
    scale, softcap, BOUNDED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of the positions first_position .. last_position over the text; BOUNDED if ``first`` is not always 0."""
    begin, full_begin, full_end, end = text_ranges(first, first_position, last_position, BOUNDED, KEYS)
    if BOUNDED:
        acc, total, top = attend(
            acc, total, top, q, k, v, k_stride, v_stride, begin, full_begin, positions, first, last, 1, scale, softcap,
            OWN=False, MASKED=True, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
        )  # fmt: skip
    acc, total, top = attend(
        acc, total, top, q, k, v, k_stride, v_stride, full_begin, full_end, positions, first, last, 1, scale, softcap,
        OWN=False, MASKED=False, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
    )  # fmt: skip
    return attend(
        acc, total, top, q, k, v, k_stride, v_stride, full_end, end, positions, first, last, 1, scale, softcap,
        OWN=False, MASKED=True, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
    )  # fmt: skip


@triton.jit
def begin_softmax(sinks, heads, M: tl.constexpr):
    """Total and top of rows that have met no key; a sink is a key without a value."""
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    if sinks is not None:
        top = tl.load(sinks + heads).to(tl.float32) * LOG2E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    return total, top


@triton.jit
def end_softmax(acc, total, top):
    """Output and natural log-sum-exp; a row that met nothing has 0 and -inf."""
    seen = total != 0  # a NaN has been seen
    out = scale_rows(acc, tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0))
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    return out, lse


@triton.jit
def forward_kernel(
    q, k, v, out, lse, sinks, text_start, q_stride, k_stride, v_stride, out_stride, pairs, kv_heads, positions, slots,
    tokens, scale, window, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_OWN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """q [B, Hq, N, C, D], k [B, Hkv, N, C, D], v [B, Hkv, N, C, DV] -> out [B, Hq, N, C, DV], lse [B, Hq, N, C]."""
    count = positions * slots * GROUP
    pair = tl.program_id(0) % pairs
    tile = tl.cdiv(count, ROWS) - 1 - tl.program_id(0) // pairs  # the longest first
    batch = tl.cast(pair // kv_heads, tl.int64)
    kv_head = tl.cast(pair % kv_heads, tl.int64)

    rows = tile * ROWS + tl.arange(0, ROWS)
    position, slot, member = decode_rows(rows, count, slots, GROUP)
    head = kv_head * GROUP + member
    cell = tl.cast(position, tl.int64), tl.cast(slot, tl.int64)
    q += batch * q_stride[0]
    q_tile = load_rows(q, head * q_stride[1] + cell[0] * q_stride[2] + cell[1] * q_stride[3], D)
    k += batch * k_stride[0] + kv_head * k_stride[1]
    v += batch * v_stride[0] + kv_head * v_stride[1]
    if text_start is not None:
        text_start += batch * positions
    first_flat = tile * ROWS // GROUP
    last_flat = (tl.minimum(tile * ROWS + ROWS, count) - 1) // GROUP

    total, top = begin_softmax(sinks, head, ROWS)
    acc = zero_rows(ROWS, DV)
    if HAS_OWN:
        begin, end = own_range(first_flat, last_flat, slots, tokens)
        first, last = own_interval(position, slot, slots, tokens, window)
        acc, total, top = attend(
            acc, total, top, q_tile, k, v, k_stride, v_stride, begin, end, positions * (slots - 1), first, last, slots,
            scale, softcap, OWN=True, MASKED=True, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
        )  # fmt: skip
    first, last = text_interval(position, slot, tokens, window, text_start)
    acc, total, top = attend_text(
        acc, total, top, q_tile, k, v, k_stride, v_stride, first_flat // slots, last_flat // slots, first, last,
        positions, scale, softcap, BOUNDED=window is not None or text_start is not None, KEYS=KEYS, D=D, DV=DV,
        PRECISION=PRECISION,
    )  # fmt: skip

    keep = rows < count
    result, row_lse = end_softmax(acc, total, top)
    out += batch * out_stride[0]
    store_rows(out, head * out_stride[1] + cell[0] * out_stride[2] + cell[1] * out_stride[3], result, keep, DV)
    head += batch * kv_heads * GROUP
    tl.store(lse + (head * positions + cell[0]) * slots + cell[1], row_lse, mask=keep)
