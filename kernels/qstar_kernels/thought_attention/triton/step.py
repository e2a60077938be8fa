"""One step of thinking: the newest token of every rationale over its own tokens and over the text.

A rationale's own keys serve the heads of its group alone, so they are multiplied element by element; the text keys go
through the same loop as in the packed forward.
"""

import triton
import triton.language as tl

from qstar_kernels.common.primitives import LOG2E, load_rows, main_part, rest_part, rounded_product, store_rows, tanh
from qstar_kernels.thought_attention.triton.forward import attend_text, begin_softmax, end_softmax


@triton.constexpr_function
def members(group, rows):
    """How many heads of a group a program takes: all, padded to a power of two, unless they are more than its rows."""
    return min(triton.next_power_of_2(group), rows)


@triton.jit
def group_dot(q, k, UNITS: tl.constexpr, GROUP: tl.constexpr):
    """Each of GROUP rows of q [UNITS * GROUP, W] with its unit's row of k [UNITS, W]: ``[UNITS, GROUP]``."""
    W: tl.constexpr = q.shape[1]
    return tl.sum(rounded_product(tl.reshape(q, [UNITS, GROUP, W]), k[:, None, :]), 2)


@triton.jit
def group_update(acc, shrink, p, v, UNITS: tl.constexpr, GROUP: tl.constexpr):
    """acc [UNITS * GROUP, W] times shrink plus p, both [UNITS, GROUP], times v [UNITS, W]."""
    W: tl.constexpr = acc.shape[1]
    groups = tl.reshape(acc, [UNITS, GROUP, W]) * shrink[:, :, None]
    return tl.reshape(groups + p[:, :, None] * v.to(tl.float32)[:, None, :], [UNITS * GROUP, W])


@triton.jit
def attend_own(
    acc, total, top, q, k, v, k_offsets, v_offsets, k_stride, v_stride, begin, end, scale, softcap,
    UNITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Rows q over the tokens begin .. end of their own rationales, one token at a time."""
    total = tl.reshape(total, [UNITS, GROUP])
    top = tl.reshape(top, [UNITS, GROUP])
    for token in range(begin, end):
        k_tile = load_rows(k + tl.cast(token, tl.int64) * k_stride, k_offsets, D)
        v_tile = load_rows(v + tl.cast(token, tl.int64) * v_stride, v_offsets, DV)
        s = group_dot(q[0], k_tile[0], UNITS, GROUP)
        if len(q) > 1:
            s += group_dot(q[1], k_tile[1], UNITS, GROUP)
        if softcap is None:
            s *= scale * LOG2E
        else:
            s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
        new_top = tl.maximum(top, s)
        p = tl.exp2(s - new_top)
        shrink = tl.exp2(top - new_top)
        updated = (group_update(acc[0], shrink, p, v_tile[0], UNITS, GROUP),)
        if len(acc) > 1:
            updated = (updated[0], group_update(acc[1], shrink, p, v_tile[1], UNITS, GROUP))
        acc = updated
        total = total * shrink + p
        top = new_top
    return acc, tl.reshape(total, [UNITS * GROUP]), tl.reshape(top, [UNITS * GROUP])


@triton.jit(do_not_specialize=["step", "positions", "queries"])  # what changes from call to call
def step_kernel(
    q, k_text, v_text, k_thought, v_thought, step, out, lse, sinks, text_start, at, q_stride, k_text_stride,
    v_text_stride, k_thought_stride, v_thought_stride, out_stride, pairs, kv_heads, positions, queries, rationales,
    scale, window, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, STEP_IN_MEMORY: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """q [B, Hq, Nq, r, D], text [B, Hkv, N, D], thoughts [B, Hkv, Nq, r, T, D] -> out [B, Hq, Nq, r, DV], lse.

    Rows are (position, rationale, head of the group), the group padded to a power of two; a group of more heads than
    a program has rows is shared out. The positions are the last ones, or those that ``at`` [B, Nq] holds.
    """
    MEMBERS: tl.constexpr = members(GROUP, ROWS)
    SHARES: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    UNITS: tl.constexpr = ROWS // MEMBERS
    if STEP_IN_MEMORY:
        step = tl.load(step).to(tl.int32)
    count = queries * rationales
    pair = tl.program_id(0) % (pairs * SHARES)
    tile = tl.cdiv(count, UNITS) - 1 - tl.program_id(0) // (pairs * SHARES)
    first_member = pair % SHARES * MEMBERS
    pair = pair // SHARES
    batch = tl.cast(pair // kv_heads, tl.int64)
    kv_head = tl.cast(pair % kv_heads, tl.int64)

    units = tl.minimum(tile * UNITS + tl.arange(0, UNITS), count - 1)
    query = tl.cast(units // rationales, tl.int64)
    rationale = tl.cast(units % rationales, tl.int64)
    k_thought += batch * k_thought_stride[0] + kv_head * k_thought_stride[1]
    v_thought += batch * v_thought_stride[0] + kv_head * v_thought_stride[1]
    k_offsets = query * k_thought_stride[2] + rationale * k_thought_stride[3]
    v_offsets = query * v_thought_stride[2] + rationale * v_thought_stride[3]

    row = tile * ROWS + tl.arange(0, ROWS)
    unit = tl.minimum(row // MEMBERS, count - 1)
    member = first_member + row % MEMBERS
    keep = (row // MEMBERS < count) & (member < GROUP)
    head = kv_head * GROUP + tl.minimum(member, GROUP - 1)
    row_query = unit // rationales
    cell = tl.cast(row_query, tl.int64), tl.cast(unit % rationales, tl.int64)
    q_tile = load_rows(q + batch * q_stride[0], head * q_stride[1] + cell[0] * q_stride[2] + cell[1] * q_stride[3], D)

    total, top = begin_softmax(sinks, head, ROWS)
    acc = (tl.zeros([ROWS, main_part(DV)], tl.float32),)
    if rest_part(DV) > 0:
        acc = (acc[0], tl.zeros([ROWS, rest_part(DV)], tl.float32))
    begin = 0
    if window is not None:
        begin = tl.maximum(step - window + 1, 0)
    acc, total, top = attend_own(
        acc, total, top, q_tile, k_thought, v_thought, k_offsets, v_offsets, k_thought_stride[4], v_thought_stride[4],
        begin, step + 1, scale, softcap, UNITS=UNITS, GROUP=MEMBERS, D=D, DV=DV,
    )  # fmt: skip

    if at is None:
        position = positions - queries + row_query
        first_position = positions - queries + tile * UNITS // rationales
        last_position = positions - queries + (tl.minimum(tile * UNITS + UNITS, count) - 1) // rationales
    else:
        position = tl.load(at + batch * queries + row_query)
        position = tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int32)  # nobody has checked them
        first_position = tl.min(position, 0)
        last_position = tl.max(position, 0)
    first = tl.zeros_like(position)
    if window is not None:
        first = tl.maximum(first, position + 2 + step - window)
    if text_start is not None:
        start = tl.load(text_start + batch * positions + position)
        first = tl.maximum(first, tl.minimum(tl.maximum(start, 0), position + 1).to(tl.int32))
    k_text += batch * k_text_stride[0] + kv_head * k_text_stride[1]
    v_text += batch * v_text_stride[0] + kv_head * v_text_stride[1]
    acc, total, top = attend_text(
        acc, total, top, q_tile, k_text, v_text, k_text_stride, v_text_stride, first_position, last_position, first,
        position, positions, scale, softcap, BOUNDED=window is not None or text_start is not None, KEYS=KEYS, D=D,
        DV=DV, PRECISION=PRECISION,
    )  # fmt: skip

    result, row_lse = end_softmax(acc, total, top)
    store_rows(
        out + batch * out_stride[0], head * out_stride[1] + cell[0] * out_stride[2] + cell[1] * out_stride[3], result,
        keep, DV,
    )  # fmt: skip
    head += batch * kv_heads * GROUP
    tl.store(lse + (head * queries + cell[0]) * rationales + cell[1], row_lse, mask=keep)
