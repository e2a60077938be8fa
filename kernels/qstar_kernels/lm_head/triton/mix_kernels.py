"""The mixing head's last layer and interpolation: a program takes a row, and in the backward also a base row's share.

Sums run in float32 and in a fixed order; nothing is added atomically.
"""

import triton
import triton.language as tl

from qstar_kernels.common.primitives import narrow


@triton.jit
def load(row, columns, stride, width):
    """Columns of a row, in float32; 0 beyond its end."""
    return tl.load(row + tl.cast(columns, tl.int64) * stride[1], mask=columns < width, other=0.0).to(tl.float32)


@triton.jit
def base_row(base, base_index, row, stride):
    if base_index is not None:
        row = tl.load(base_index + row)
    return base + row * stride[0]


@triton.jit
def mix_kernel(
    base, thought, features, head_weight, base_index, mixed, w,
    base_stride, thought_stride, features_stride, head_stride, width,
    SIGMOID: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """base [Rb, E], thought and features [R, E], head_weight [E], base_index [R] -> mixed [R, E], w [R]."""
    row = tl.cast(tl.program_id(0), tl.int64)
    lanes = tl.arange(0, COLUMNS)

    features += row * features_stride[0]
    products = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, width, COLUMNS):
        columns = start + lanes
        products += load(features, columns, features_stride, width) * load(head_weight, columns, head_stride, width)
    weight = tl.sum(products, 0)
    if SIGMOID:
        weight = tl.sigmoid(weight)
    tl.store(w + row, weight)

    base = base_row(base, base_index, row, base_stride)
    thought += row * thought_stride[0]
    mixed += row * width
    for start in range(0, width, COLUMNS):
        columns = start + lanes
        u = load(base, columns, base_stride, width)
        # u + 0 would lose the sign of a zero and let a thought's infinity through.
        x = tl.where(weight == 0, u, u + weight * (load(thought, columns, thought_stride, width) - u))
        tl.store(mixed + columns, narrow(x, mixed.dtype.element_ty), mask=columns < width)


@triton.jit
def mix_gradient_kernel(
    d_mixed, d_weight, base, thought, head_weight, base_index, w, d_thought, d_features, d_score,
    d_mixed_stride, base_stride, thought_stride, head_stride, width,
    SIGMOID: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """d_mixed [R, E], d_weight [R] -> d_thought and d_features [R, E], d_score [R] of what the sigmoid is taken of."""
    row = tl.cast(tl.program_id(0), tl.int64)
    lanes = tl.arange(0, COLUMNS)
    weight = tl.load(w + row)
    d_w = 0.0
    if d_weight is not None:
        d_w += tl.load(d_weight + row)

    if d_mixed is not None:
        d_mixed += row * d_mixed_stride[0]
        base = base_row(base, base_index, row, base_stride)
        thought += row * thought_stride[0]
        products = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            columns = start + lanes
            d = load(d_mixed, columns, d_mixed_stride, width)
            u = load(base, columns, base_stride, width)
            products += d * (load(thought, columns, thought_stride, width) - u)
            if d_thought is not None:
                pointers = d_thought + row * width + columns
                tl.store(pointers, narrow(weight * d, d_thought.dtype.element_ty), mask=columns < width)
        d_w += tl.sum(products, 0)
    if SIGMOID:
        d_w *= weight * (1.0 - weight)
    tl.store(d_score + row, d_w)

    if d_features is not None:
        d_features += row * width
        for start in range(0, width, COLUMNS):
            columns = start + lanes
            x = d_w * load(head_weight, columns, head_stride, width)
            tl.store(d_features + columns, narrow(x, d_features.dtype.element_ty), mask=columns < width)


@triton.jit
def base_gradient_kernel(d_mixed, w, order, ends, d_base, d_mixed_stride, width, COLUMNS: tl.constexpr):
    """d_base [Rb, E]; the rows that share base row i are ``order[ends[i - 1] : ends[i]]``, row i alone without."""
    blocks = tl.cdiv(width, COLUMNS)
    row = tl.cast(tl.program_id(0) // blocks, tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    if order is None:
        total = (1.0 - tl.load(w + row)) * load(d_mixed + row * d_mixed_stride[0], columns, d_mixed_stride, width)
    else:
        total = tl.zeros([COLUMNS], tl.float32)
        begin = tl.load(ends + row - 1, mask=row > 0, other=0)
        for i in range(begin, tl.load(ends + row)):
            sharer = tl.load(order + i)
            d = load(d_mixed + sharer * d_mixed_stride[0], columns, d_mixed_stride, width)
            total += (1.0 - tl.load(w + sharer)) * d
    tl.store(d_base + row * width + columns, narrow(total, d_base.dtype.element_ty), mask=columns < width)
