"""Counter-based random numbers: a draw depends on its key and counter alone, never on who makes it or when.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

For a few rows the time of a tensor operation is all overhead, so on a CPU they are computed in one wide integer of
Python's, a lane of 64 bits for each: room for a product of two words of 32.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW_32 = 0xFFFFFFFF
FEW_ROWS = 512  # at which wide integers take half the time of tensors; at 16 rows it is a fifteenth

Words = TypeVar("Words", int, Tensor)
Key = tuple[int, int] | tuple[Tensor, Tensor]


def philox4x32(counter: tuple[Words, Words, Words, Words], key: Key, ones: int = 1) -> tuple[Words, ...]:
    """Four words of 32 random bits for every counter, four words of 32 bits.

    They are int64 tensors, or integers with a word in every lane of 64 bits: ``ones`` has a 1 in each of these, and
    the key's words are in all of them.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    low, step0, step1 = LOW_32 * ones, KEY_STEPS[0] * ones, KEY_STEPS[1] * ones
    for _ in range(10):
        # int64 products wrap; their upper 32 bits, read without the sign, are those of the unsigned product.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & low, (product1 >> 32) & low
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & low, high0 ^ c3 ^ k1, product0 & low
        k0, k1 = (k0 + step0) & low, (k1 + step1) & low
    return c0, c1, c2, c3


def bits_of_uniform(high: Words, low: Words, ones: int = 1) -> Words:
    """The 53 bits ``high 2^21 + floor(low / 2^11)`` of two words of 32, see :func:`philox4x32`."""
    return (high << 21) | ((low >> 11) & (LOW_32 * ones))


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """A float64 uniform on [0, 1) of two words of 32 bits: ``(high 2^21 + floor(low / 2^11)) 2^-53``."""
    return bits_of_uniform(high, low).double() * 2.0**-53


def words_of(value: Words, ones: int = 1) -> tuple[Words, Words]:
    """The low and the high 32 of an integer's 64 bits; of a negative one, as of a tensor, those of two's complement."""
    value = value.long() if isinstance(value, Tensor) else value
    return value & (LOW_32 * ones), value >> 32 & (LOW_32 * ones)


def row_uniforms(
    seed: int | Tensor, step: int | Tensor, rows: range | Tensor, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Two float64 uniforms on [0, 1), multiples of 2^-53, for every row: of a range on ``device``, or of ``[R]`` int64.

    key = (seed low 32 bits, seed high 32 bits), counter = (row low, row high, step low, step high); words (w0, w1) make
    the first :func:`uniform` and (w2, w3) the second.
    """
    if isinstance(rows, Tensor):
        device = rows.device
    on_cpu = device is None or device.type == "cpu"
    known = not isinstance(seed, Tensor) and not isinstance(step, Tensor)  # else nobody asked the host to read them
    if (
        on_cpu and known and 0 < len(rows) <= FEW_ROWS and not torch.compiler.is_compiling()
    ):  # which follows tensors only
        return few_row_uniforms(seed, step, rows if isinstance(rows, range) else rows.tolist())
    if isinstance(rows, range):
        rows = torch.arange(rows.start, rows.stop, device=device)
    zeros = torch.zeros_like(rows)
    w0, w1, w2, w3 = philox4x32((*words_of(rows), *(zeros + word for word in words_of(step))), words_of(seed))
    return uniform(w0, w1), uniform(w2, w3)


def few_row_uniforms(seed: int, step: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """As :func:`row_uniforms`, by wide integers."""
    ones = int.from_bytes(array("q", [1]) * len(rows), sys.byteorder)
    numbers = int.from_bytes(array("q", rows), sys.byteorder)
    (k0, k1), (c2, c3) = words_of(seed), words_of(step)
    w0, w1, w2, w3 = philox4x32((*words_of(numbers, ones), c2 * ones, c3 * ones), (k0 * ones, k1 * ones), ones)
    both = bits_of_uniform(w0, w1, ones), bits_of_uniform(w2, w3, ones)
    memory = bytearray().join(bits.to_bytes(8 * len(rows), sys.byteorder) for bits in both)
    first, second = (torch.frombuffer(memory, dtype=torch.int64).double() * 2.0**-53).view(2, -1)
    return first, second
