"""What happens to a row of logits between two products: a program takes a row of h W^T, a block of columns at a time.

    y = softcap(logit_scale (h W^T + bias)) / temperature

``gain`` and ``cap`` hold the factors: y = gain x without a soft-cap, cap tanh(gain x) with one. Forbidden columns are
-inf when they come. A row has ``width`` columns in memory, a multiple of 16, so that blocks are read and written 16
bytes at a time whatever the vocabulary is.
"""

import triton
import triton.language as tl

from qstar_kernels.common.primitives import narrow, tanh

LOWEST = tl.constexpr(-1.0e30)  # below every logit, and finite: no difference or product with it is NaN


@triton.jit
def load_logits(logits, bias, columns, vocabulary, width, gain, cap):
    """y of a row's columns; LOWEST where there is no column or its logit is -inf."""
    x = tl.load(logits + columns, mask=columns < width, other=0.0)
    outside = (columns >= vocabulary) | (x < LOWEST)
    x = tl.where(outside, 0.0, x)
    if bias is not None:
        x += tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
    x *= gain
    if cap is not None:
        x = tanh(x) * cap
    return tl.where(outside | (x < LOWEST), LOWEST, x)


@triton.jit
def scan_row(logits, bias, vocabulary, width, gain, cap, MOMENT: tl.constexpr, COLUMNS: tl.constexpr):
    """The maximum of a row's y, the sum of e = exp(y - maximum) and, if asked, that of e (y - maximum).

    Every lane has its own maximum until the end: one exponential an element, and no reduction in the loop.
    """
    lanes = tl.arange(0, COLUMNS)
    top = tl.full([COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    moment = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, vocabulary, COLUMNS):
        y = load_logits(logits, bias, start + lanes, vocabulary, width, gain, cap)
        rise = y - top
        e = tl.exp(-tl.abs(rise))
        if MOMENT:
            moment = tl.where(rise > 0, e * (moment - rise * total), moment + e * rise)
        total = tl.where(rise > 0, e * total + 1.0, total + e)
        top = tl.where(rise > 0, y, top)
    row_top = tl.max(top, 0)
    shrink = tl.exp(top - row_top)
    row_moment = 0.0
    if MOMENT:
        row_moment = tl.sum(shrink * (moment + (top - row_top) * total), 0)
    return row_top, tl.sum(shrink * total, 0), row_moment


@triton.jit
def at_most_zero(x):
    """Without hiding a NaN."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def score_kernel(logits, targets, bias, log_prob, entropy, vocabulary, width, gain, cap, COLUMNS: tl.constexpr):
    """logits [R, V], targets [R] -> log_prob [R] and, unless None, entropy [R]."""
    row = tl.cast(tl.program_id(0), tl.int64)
    logits += row * width
    top, total, moment = scan_row(logits, bias, vocabulary, width, gain, cap, entropy is not None, COLUMNS)
    label = load_logits(logits, bias, tl.load(targets + row), vocabulary, width, gain, cap)
    log_total = tl.log(total)
    tl.store(log_prob + row, at_most_zero(label - top) - log_total)
    if entropy is not None:
        # Neither term is negative, so that nothing cancels where one token has all the mass.
        tl.store(entropy + row, log_total - moment / total)


@triton.jit
def gradient_kernel(
    logits, targets, bias, d_log_prob, d_entropy, entropy, log_prob, d_logits, d_row_stride,
    vocabulary, width, gain, cap, slope, COLUMNS: tl.constexpr,
):  # fmt: skip
    """logits [R, V] -> d_logits [R, V] in the place of the logits, and unless None log_prob [R].

    ``slope`` is the derivative of y by the product, that of the soft-cap aside.

    Narrower d_logits begin where their row does. No program overwrites a logit that it has yet to read: blocks go up,
    the bytes of a block's gradient lie no higher than those of its logits, and a block is read before it is written.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    lanes = tl.arange(0, COLUMNS)
    logits += row * width
    d_logits += row * d_row_stride
    top, total, _ = scan_row(logits, bias, vocabulary, width, gain, cap, False, COLUMNS)
    target = tl.load(targets + row)
    log_total = tl.log(total)
    if log_prob is not None:
        label = load_logits(logits, bias, target, vocabulary, width, gain, cap)
        tl.store(log_prob + row, at_most_zero(label - top) - log_total)

    from_label = tl.load(d_log_prob + row) * slope
    if d_entropy is not None:
        from_entropy = tl.load(d_entropy + row) * slope
        shift = tl.load(entropy + row) - log_total
    inverse = 1.0 / total
    for start in range(0, vocabulary, COLUMNS):
        columns = start + lanes
        y = load_logits(logits, bias, columns, vocabulary, width, gain, cap)
        x = y - top
        p = tl.exp(x) * inverse
        d = from_label * (tl.where(columns == target, 1.0, 0.0) - p)
        if d_entropy is not None:
            d -= from_entropy * p * (x + shift)
        if cap is not None:
            t = tl.maximum(y * (1.0 / cap), -1.0)
            d *= 1.0 - t * t
        tl.debug_barrier()
        tl.store(d_logits + columns, narrow(d, d_logits.dtype.element_ty), mask=columns < width)
