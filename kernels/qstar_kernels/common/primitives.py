"""Words that the Triton kernels share.

A tile of rows of W values is held as a tuple of one or two blocks, W = 96 as 64 + 32: Triton's blocks have powers of
two for sizes, and no product is done on padding. Products accumulate in float32.
"""

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
# The interpreter multiplies the bits of bfloat16 as if they were integers, and cuts where a card rounds.
EMULATED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def main_part(width):
    """The largest power of two in ``width`` >= 16."""
    return min(1 << (width.bit_length() - 1), 128)


@triton.constexpr_function
def rest_part(width):
    """A block for what is left of ``width`` after its main part, 0 where nothing is."""
    rest = width - min(1 << (width.bit_length() - 1), 128)
    return max(16, triton.next_power_of_2(rest)) if rest else 0


@triton.jit
def load_rows(base, offsets, W: tl.constexpr):
    """Rows of W values at ``base + offsets [M]``."""
    MAIN: tl.constexpr = main_part(W)
    REST: tl.constexpr = rest_part(W)
    columns = tl.arange(0, MAIN)
    rows = (tl.load(base + (offsets[:, None] + columns[None, :])),)
    if REST > 0:
        columns = MAIN + tl.arange(0, REST)
        pointers = base + (offsets[:, None] + columns[None, :])
        rows = (rows[0], tl.load(pointers, mask=columns[None, :] < W, other=0.0))
    return rows


@triton.jit
def store_rows(base, offsets, rows, keep, W: tl.constexpr):
    """Store the rows where ``keep [M]``, in the dtype of ``base``."""
    MAIN: tl.constexpr = main_part(W)
    REST: tl.constexpr = rest_part(W)
    dtype = base.dtype.element_ty
    columns = tl.arange(0, MAIN)
    tl.store(base + (offsets[:, None] + columns[None, :]), narrow(rows[0], dtype), mask=keep[:, None])
    if REST > 0:
        columns = MAIN + tl.arange(0, REST)
        pointers = base + (offsets[:, None] + columns[None, :])
        tl.store(pointers, narrow(rows[1], dtype), mask=keep[:, None] & (columns[None, :] < W))


@triton.jit
def zero_rows(M: tl.constexpr, W: tl.constexpr):
    """M rows of W zeros in float32."""
    REST: tl.constexpr = rest_part(W)
    rows = (tl.zeros([M, main_part(W)], tl.float32),)
    if REST > 0:
        rows = (rows[0], tl.zeros([M, REST], tl.float32))
    return rows


@triton.jit
def scale_rows(rows, factor):
    """Each row times its ``factor [M]``."""
    scaled = (rows[0] * factor[:, None],)
    if len(rows) > 1:
        scaled = (scaled[0], rows[1] * factor[:, None])
    return scaled


@triton.jit
def rounded_product(x, y):
    """x y in float32, rounded before it is added to anything.

    Lanes that share a sum add the same products in an order of their own. Were a product contracted into the addition,
    in each lane its own one, they would end with different last bits, and whose are stored would be chance. 16-bit
    factors have exact products.
    """
    if x.dtype == tl.float32:
        return tl.where(x == x, x * y, x)  # a choice that no compiler contracts
    return x.to(tl.float32) * y.to(tl.float32)


@triton.jit
def row_dot(x, y):
    """The inner product of each row of x with that of y, ``[M]`` float32."""
    total = tl.sum(rounded_product(x[0], y[0]), 1)
    if len(x) > 1:
        total += tl.sum(rounded_product(x[1], y[1]), 1)
    return total


@triton.jit
def operand(x):
    return x.to(tl.float32) if EMULATED else x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 rounded to ``dtype``, to nearest even."""
    if EMULATED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(x, y, PRECISION: tl.constexpr):
    """Rows x times rows y, transposed: ``[M, N]`` float32."""
    result = tl.dot(operand(x[0]), operand(y[0]).T, input_precision=PRECISION)
    if len(x) > 1:
        result = tl.dot(operand(x[1]), operand(y[1]).T, acc=result, input_precision=PRECISION)
    return result


@triton.jit
def add_product(rows, weights, y, PRECISION: tl.constexpr):
    """``rows + weights [M, N] @ y``, the weights rounded to the dtype of y."""
    weights = operand(narrow(weights, y[0].dtype))
    added = (tl.dot(weights, operand(y[0]), acc=rows[0], input_precision=PRECISION),)
    if len(rows) > 1:
        added = (added[0], tl.dot(weights, operand(y[1]), acc=rows[1], input_precision=PRECISION))
    return added


@triton.jit
def tanh(x):
    """To the last bits of float32 everywhere (the polynomial is that of Cephes' tanhf)."""
    size = tl.abs(x)
    square = x * x
    series = -5.70498872745e-3
    series = series * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = x + x * square * series
    large = 1.0 - 2.0 / (tl.exp2(size * (2.0 * LOG2E)) + 1.0)
    return tl.where(size < 0.625, small, tl.where(x < 0, -large, large))
