"""Packed thought attention, backward, without atomics: the same bits every time.

    p = exp(s - lse)    dp = do v^T    delta = rowsum(do * out)    ds = p (dp - delta)
    dq = scale ds k     dk = scale ds^T q    dv = p^T do

``query_gradient_kernel`` takes a tile of rows as the forward does and makes delta and dq. ``key_gradient_kernel`` takes
a tile of keys over all rows that see them; it runs once for the text keys and once for the own keys.
"""

import triton
import triton.language as tl

from qstar_kernels.common.primitives import (
    LOG2E,
    add_product,
    load_rows,
    product,
    row_dot,
    scale_rows,
    store_rows,
    zero_rows,
)
from qstar_kernels.thought_attention.triton.visible import (
    decode_rows,
    key_offsets,
    key_origin,
    own_interval,
    own_range,
    scores,
    softcap_slope,
    text_interval,
    text_ranges,
)


@triton.jit
def add_query_gradient(
    dq, q, do, lse, delta, k, v, k_stride, v_stride, begin, end, count, first, last, slots, scale, softcap,
    OWN: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq plus what the keys begin .. end give, before the scale; ``lse [M]`` in units of log2(e)."""
    for start in range(begin, end, KEYS):
        keys = start + tl.arange(0, KEYS)
        inside = tl.minimum(keys, count - 1) if MASKED else keys
        k_tile = load_rows(
            k + key_origin(start, slots, k_stride, OWN), key_offsets(inside, start, slots, k_stride, OWN), D
        )
        v_tile = load_rows(
            v + key_origin(start, slots, v_stride, OWN), key_offsets(inside, start, slots, v_stride, OWN), DV
        )
        s = scores(q, k_tile, scale, softcap, PRECISION)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            p = tl.where((keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None]), p, 0.0)
        ds = p * (product(do, v_tile, PRECISION) - delta[:, None])
        if softcap is not None:
            ds *= softcap_slope(s, softcap)
        dq = add_product(dq, ds, k_tile, PRECISION)
    return dq


@triton.jit
def query_gradient_kernel(
    q, k, v, out, do, lse, delta, dq, text_start, q_stride, k_stride, v_stride, out_stride, do_stride, dq_stride, pairs,
    kv_heads, positions, slots, tokens, scale, window, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_OWN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dq as q [B, Hq, N, C, D] and delta [B, Hq, N, C] from out and do [B, Hq, N, C, DV]."""
    count = positions * slots * GROUP
    pair = tl.program_id(0) % pairs
    tile = tl.cdiv(count, ROWS) - 1 - tl.program_id(0) // pairs
    batch = tl.cast(pair // kv_heads, tl.int64)
    kv_head = tl.cast(pair % kv_heads, tl.int64)

    rows = tile * ROWS + tl.arange(0, ROWS)
    keep = rows < count
    position, slot, member = decode_rows(rows, count, slots, GROUP)
    head = kv_head * GROUP + member
    cell = tl.cast(position, tl.int64), tl.cast(slot, tl.int64)
    q_tile = load_rows(q + batch * q_stride[0], head * q_stride[1] + cell[0] * q_stride[2] + cell[1] * q_stride[3], D)
    do_tile = load_rows(
        do + batch * do_stride[0], head * do_stride[1] + cell[0] * do_stride[2] + cell[1] * do_stride[3], DV
    )
    out_tile = load_rows(
        out + batch * out_stride[0], head * out_stride[1] + cell[0] * out_stride[2] + cell[1] * out_stride[3], DV
    )
    flat = ((head + batch * kv_heads * GROUP) * positions + cell[0]) * slots + cell[1]
    row_delta = row_dot(do_tile, out_tile)
    tl.store(delta + flat, row_delta, mask=keep)
    row_lse = tl.load(lse + flat) * LOG2E  # -inf where nothing was seen: all of that is masked

    k += batch * k_stride[0] + kv_head * k_stride[1]
    v += batch * v_stride[0] + kv_head * v_stride[1]
    if text_start is not None:
        text_start += batch * positions
    first_flat = tile * ROWS // GROUP
    last_flat = (tl.minimum(tile * ROWS + ROWS, count) - 1) // GROUP

    acc = zero_rows(ROWS, D)
    if HAS_OWN:
        begin, end = own_range(first_flat, last_flat, slots, tokens)
        first, last = own_interval(position, slot, slots, tokens, window)
        acc = add_query_gradient(
            acc, q_tile, do_tile, row_lse, row_delta, k, v, k_stride, v_stride, begin, end, positions * (slots - 1),
            first, last, slots, scale, softcap, OWN=True, MASKED=True, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
        )  # fmt: skip
    first, last = text_interval(position, slot, tokens, window, text_start)
    begin, full_begin, full_end, end = text_ranges(
        first, first_flat // slots, last_flat // slots, window is not None or text_start is not None, KEYS
    )
    if window is not None or text_start is not None:
        acc = add_query_gradient(
            acc, q_tile, do_tile, row_lse, row_delta, k, v, k_stride, v_stride, begin, full_begin, positions, first,
            last, slots, scale, softcap, OWN=False, MASKED=True, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
        )  # fmt: skip
    acc = add_query_gradient(
        acc, q_tile, do_tile, row_lse, row_delta, k, v, k_stride, v_stride, full_begin, full_end, positions, first,
        last, slots, scale, softcap, OWN=False, MASKED=False, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
    )  # fmt: skip
    acc = add_query_gradient(
        acc, q_tile, do_tile, row_lse, row_delta, k, v, k_stride, v_stride, full_end, end, positions, first,
        last, slots, scale, softcap, OWN=False, MASKED=True, KEYS=KEYS, D=D, DV=DV, PRECISION=PRECISION,
    )  # fmt: skip
    acc = scale_rows(acc, tl.full([ROWS], 1.0, tl.float32) * scale)
    store_rows(
        dq + batch * dq_stride[0], head * dq_stride[1] + cell[0] * dq_stride[2] + cell[1] * dq_stride[3], acc, keep, D
    )


@triton.jit
def add_key_gradients(
    dk, dv, k, v, keys, q, do, lse, delta, q_stride, do_stride, text_start, begin, end, positions, slots, tokens,
    scale, window, softcap,
    GROUP: tl.constexpr, OWN: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, before the scale, and dv of ``keys`` plus what the rows begin .. end give; q, do, lse and delta of the group.

    Rows beyond the end, which repeat the last, get an infinite log-sum-exp and so no weight.
    """
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        position, slot, member = decode_rows(rows, end, slots, GROUP)
        cell = tl.cast(member, tl.int64), tl.cast(position, tl.int64), tl.cast(slot, tl.int64)
        flat = (member * positions + position) * slots + slot
        row_lse = tl.where(rows < end, tl.load(lse + flat) * LOG2E, float("inf"))
        q_tile = load_rows(q, cell[0] * q_stride[1] + cell[1] * q_stride[2] + cell[2] * q_stride[3], D)
        do_tile = load_rows(do, cell[0] * do_stride[1] + cell[1] * do_stride[2] + cell[2] * do_stride[3], DV)
        s = scores(k, q_tile, scale, softcap, PRECISION)
        p = tl.exp2(s - row_lse[None, :])
        if MASKED:
            if OWN:
                first, last = own_interval(position, slot, slots, tokens, window)
            else:
                first, last = text_interval(position, slot, tokens, window, text_start)
            p = tl.where((keys[:, None] >= first[None, :]) & (keys[:, None] <= last[None, :]), p, 0.0)
        dv = add_product(dv, p, do_tile, PRECISION)
        ds = p * (product(v, do_tile, PRECISION) - tl.load(delta + flat)[None, :])
        if softcap is not None:
            ds *= softcap_slope(s, softcap)
        dk = add_product(dk, ds, q_tile, PRECISION)
    return dk, dv


@triton.jit
def key_gradient_kernel(
    q, k, v, do, lse, delta, dk, dv, text_start, q_stride, k_stride, v_stride, do_stride, dk_stride, dv_stride, pairs,
    kv_heads, positions, slots, tokens, splits, scale, window, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dk and dv of the text keys, or of the OWN keys; strides [split, B, Hkv, N, C], one share of the rows a split."""
    count = positions * slots * GROUP
    key_count = positions * (slots - 1) if OWN else positions
    share = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits % pairs
    first_key = tl.program_id(0) // splits // pairs * KEYS  # the first keys are seen by the most rows
    batch = tl.cast(pair // kv_heads, tl.int64)
    kv_head = tl.cast(pair % kv_heads, tl.int64)
    last_key = tl.minimum(first_key + KEYS, key_count) - 1

    keys = first_key + tl.arange(0, KEYS)
    inside = tl.minimum(keys, last_key)
    k += batch * k_stride[0] + kv_head * k_stride[1]
    v += batch * v_stride[0] + kv_head * v_stride[1]
    k_tile = load_rows(
        k + key_origin(first_key, slots, k_stride, OWN), key_offsets(inside, first_key, slots, k_stride, OWN), D
    )
    v_tile = load_rows(
        v + key_origin(first_key, slots, v_stride, OWN), key_offsets(inside, first_key, slots, v_stride, OWN), DV
    )
    q += batch * q_stride[0] + kv_head * GROUP * q_stride[1]
    do += batch * do_stride[0] + kv_head * GROUP * do_stride[1]
    lse += (batch * kv_heads + kv_head) * count
    delta += (batch * kv_heads + kv_head) * count
    if text_start is not None:
        text_start += batch * positions

    if OWN:
        own = slots - 1
        begin = (first_key // own * slots + 1 + first_key % own) * GROUP
        last_seer = last_key // tokens * tokens + tokens - 1
        end = (last_seer // own * slots + 2 + last_seer % own) * GROUP
    else:
        begin = first_key * slots * GROUP
        end = count
        if window is not None:
            end = (last_key + tl.minimum(window, positions - last_key)) * slots * GROUP  # no more than count
    size = tl.cdiv(tl.cdiv(end - begin, ROWS), splits) * ROWS
    begin += share * size
    end = tl.minimum(begin + size, end)

    dk_acc = zero_rows(KEYS, D)
    dv_acc = zero_rows(KEYS, DV)
    full_begin = end
    if not OWN and window is None and text_start is None:
        # From the position of the last key on, every row sees every key.
        ahead = tl.maximum(last_key * slots * GROUP - begin, 0)
        full_begin = tl.minimum(begin + tl.cdiv(ahead, ROWS) * ROWS, end)
    dk_acc, dv_acc = add_key_gradients(
        dk_acc, dv_acc, k_tile, v_tile, keys, q, do, lse, delta, q_stride, do_stride, text_start, begin, full_begin,
        positions, slots, tokens, scale, window, softcap, GROUP=GROUP, OWN=OWN, MASKED=True,
        ROWS=ROWS, D=D, DV=DV, PRECISION=PRECISION,
    )  # fmt: skip
    if not OWN and window is None and text_start is None:
        dk_acc, dv_acc = add_key_gradients(
            dk_acc, dv_acc, k_tile, v_tile, keys, q, do, lse, delta, q_stride, do_stride, text_start, full_begin, end,
            positions, slots, tokens, scale, window, softcap, GROUP=GROUP, OWN=OWN, MASKED=False,
            ROWS=ROWS, D=D, DV=DV, PRECISION=PRECISION,
        )  # fmt: skip

    dk += share * dk_stride[0] + batch * dk_stride[1] + kv_head * dk_stride[2]
    dv += share * dv_stride[0] + batch * dv_stride[1] + kv_head * dv_stride[2]
    dk += key_origin(first_key, slots, dk_stride[1:], OWN)
    dv += key_origin(first_key, slots, dv_stride[1:], OWN)
    # Not clamped as ``inside`` is: what only the loads need holds no registers through the loops.
    keep = keys <= last_key
    dk_acc = scale_rows(dk_acc, tl.full([KEYS], 1.0, tl.float32) * scale)
    store_rows(dk, key_offsets(keys, first_key, slots, dk_stride[1:], OWN), dk_acc, keep, D)
    store_rows(dv, key_offsets(keys, first_key, slots, dv_stride[1:], OWN), dv_acc, keep, DV)
