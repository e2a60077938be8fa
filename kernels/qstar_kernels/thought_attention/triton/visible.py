"""Which keys each row of a Triton tile may see: two intervals, one among the text keys, one among the own keys.

Rows are (position, slot, query head of the group), the head fastest: one tile of keys then serves a whole group, and a
tile of rows spans few positions. Text keys are numbered by position. Own keys are the thought slots of all positions in
a row: slot c of position i is ``i * (slots - 1) + c - 1``, and a rationale's tokens are neighbours.
"""

import triton
import triton.language as tl

from qstar_kernels.common.primitives import LOG2E, product, tanh


@triton.jit
def decode_rows(rows, count, slots, GROUP: tl.constexpr):
    """Position, slot and head of the group; rows beyond the last repeat it."""
    rows = tl.minimum(rows, count - 1)
    flat = rows // GROUP
    return flat // slots, flat % slots, rows % GROUP


@triton.jit
def text_interval(position, slot, tokens, window, text_start):
    """First and last text key that a row may see; ``text_start`` points at those of its sequence, or is None."""
    first = tl.zeros_like(position)
    if window is not None:
        ahead = tl.where(slot > 0, 1 + (slot - 1) % tokens, 0)
        first = tl.maximum(first, position + ahead - window + 1)
    if text_start is not None:
        start = tl.load(text_start + position)
        first = tl.maximum(first, tl.minimum(tl.maximum(start, 0), position + 1).to(tl.int32))
    return first, position


@triton.jit
def own_interval(position, slot, slots, tokens, window):
    """First and last own key that a row may see; text rows have none."""
    last = position * (slots - 1) + slot - 1
    first = last - (slot - 1) % tokens
    if window is not None:
        first = tl.maximum(first, last - window + 1)
    return first, tl.where(slot > 0, last, -1)


@triton.jit
def own_range(first_flat, last_flat, slots, tokens):
    """Begin and end of the own keys that any of the cells first_flat .. last_flat, position by position, may see."""
    own = slots - 1
    begin = (first_flat // slots * own + tl.maximum(first_flat % slots - 1, 0)) // tokens * tokens
    return begin, last_flat // slots * own + last_flat % slots


@triton.jit
def text_ranges(first, first_position, last_position, BOUNDED: tl.constexpr, KEYS: tl.constexpr):
    """Text keys of the rows at first_position .. last_position: begin, full_begin, full_end, end.

    Between full_begin and full_end every row sees every key. BOUNDED if ``first [M]`` is not always 0.
    """
    end = last_position + 1
    full_end = (first_position + 1) // KEYS * KEYS
    begin = 0 * end
    full_begin = begin
    if BOUNDED:
        begin = tl.min(first, 0) // KEYS * KEYS
        full_begin = tl.minimum(tl.cdiv(tl.max(first, 0), KEYS) * KEYS, tl.cdiv(end, KEYS) * KEYS)
        full_end = tl.maximum(full_begin, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def key_origin(start, slots, stride, OWN: tl.constexpr):
    """Offset of the position of key ``start``; int64, for the grid may have more than 2**31 elements."""
    position = start // (slots - 1) if OWN else start
    return tl.cast(position, tl.int64) * stride[2]


@triton.jit
def key_offsets(keys, start, slots, stride, OWN: tl.constexpr):
    """Offsets of keys from the origin of key ``start``."""
    if OWN:
        offsets = (keys // (slots - 1) - start // (slots - 1)) * stride[2] + (1 + keys % (slots - 1)) * stride[3]
    else:
        offsets = (keys - start) * stride[2]
    return offsets


@triton.jit
def scores(x, y, scale, softcap, PRECISION: tl.constexpr):
    """Scores of rows x against rows y times log2(e), after scale and soft-cap."""
    s = product(x, y, PRECISION)
    if softcap is None:
        s *= scale * LOG2E
    else:
        s = tanh(s * (scale / softcap)) * (softcap * LOG2E)
    return s


@triton.jit
def softcap_slope(s, softcap):
    """The derivative of the soft-cap where it has the value ``s``, in units of log2(e)."""
    t = s * (1.0 / (softcap * LOG2E))
    return 1.0 - t * t
