"""Counter-based random numbers: a draw depends on its key and counter alone, never on who makes it or when.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF


Key = tuple[int, int] | tuple[Tensor, Tensor]


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Key) -> tuple[Tensor, ...]:
    """Four words of 32 random bits, as int64, for every counter (four words of 32 bits, as int64)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap; their upper 32 bits, read without the sign, are those of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & LOW_32, (product1 >> 32) & LOW_32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & LOW_32, high0 ^ c3 ^ k1, product0 & LOW_32
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return c0, c1, c2, c3


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """A float64 uniform on [0, 1) of two words of 32 bits: ``(high 2^21 + floor(low / 2^11)) 2^-53``."""
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def words_of(value: int | Tensor) -> Key:
    """The low and the high 32 of an integer's 64 bits; of a negative one, as of a tensor, those of two's complement."""
    value = value.long() if isinstance(value, Tensor) else value
    return value & LOW_32, value >> 32 & LOW_32


def row_uniforms(seed: int | Tensor, step: int | Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 uniforms on [0, 1), multiples of 2^-53, for every row.

    key = (seed low 32 bits, seed high 32 bits), counter = (row low, row high, step low, step high); words (w0, w1) make
    the first :func:`uniform` and (w2, w3) the second.
    """
    zeros = torch.zeros_like(rows)
    w0, w1, w2, w3 = philox4x32((*words_of(rows), *(zeros + word for word in words_of(step))), words_of(seed))
    return uniform(w0, w1), uniform(w2, w3)
