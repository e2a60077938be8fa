"""Inputs, cases and the one rule for tolerances: what tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALF = (torch.bfloat16, torch.float16)


class AttentionCase(NamedTuple):
    """A shape and the rules of thought attention; lengths are odd on purpose."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    positions: int = 7
    rationales: int = 1
    tokens: int = 3
    width: int = 5
    value_width: int = 5
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    text_start: bool = False

    @property
    def slots(self) -> int:
        return 1 + self.rationales * self.tokens

    @property
    def pairs(self) -> int:
        """Query-key pairs that count, all heads and sequences, without window and text_start."""
        own = self.rationales * self.tokens * (self.tokens + 1) // 2
        text = self.slots * (self.positions + 1) / 2
        return int(self.batch * self.heads * self.positions * (text + own))


class AttentionInputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    rules: dict

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in self[:4] if x is not None]


def attention_inputs(case: AttentionCase, dtype=torch.float64, *, strided=True, seed: int = 0) -> AttentionInputs:
    """Random inputs that require gradients, laid out as a transformer has them (heads inside slots) if ``strided``."""
    generator = torch.Generator().manual_seed(seed)

    def states(heads: int, width: int) -> Tensor:
        shape = (case.batch, case.positions, case.slots, heads, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).permute(0, 3, 1, 2, 4)
        return (x if strided else x.contiguous()).requires_grad_()

    q = states(case.heads, case.width)
    k, v = states(case.kv_heads, case.width), states(case.kv_heads, case.value_width)
    sinks = torch.randn(case.heads, generator=generator, dtype=torch.float64).to(dtype) if case.sinks else None
    start = None
    if case.text_start:
        start = torch.randint(0, case.positions + 1, (case.batch, case.positions), generator=generator)
    rules = {"rationales": case.rationales, "window": case.window, "softcap": case.softcap, "text_start": start}
    return AttentionInputs(q, k, v, None if sinks is None else sinks.requires_grad_(), rules)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in float64; infinities must agree."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite])
    difference = (actual[~infinite] - expected[~infinite]).norm().item()
    return difference / (expected[~infinite].norm().item() or 1.0)


def assert_close(actual: Tensor, expected: Tensor, *, gradient: bool = False, name: str = "result") -> None:
    """The rule. ``expected`` is the float64 result for the very same (already rounded) inputs.

    float64: relative norm 1e-12. float32: 2e-6. 16-bit: RMS error at most 1.5 times (results) or twice (gradients)
    that of ``expected`` computed in float32 and rounded once.
    """
    error = relative_error(actual, expected)
    if actual.dtype in HALF:
        limit = (2.0 if gradient else 1.5) * relative_error(expected.float().to(actual.dtype), expected)
    else:
        limit = {torch.float64: 1e-12, torch.float32: 2e-6}[actual.dtype]
    assert error <= limit, f"{name}: relative error {error:.3g} is above {limit:.3g}"


class LargestTensor(TorchDispatchMode):
    """Records the size, in elements, of the largest tensor that any operation inside makes."""

    largest = 0

    def __torch_dispatch__(self, func: Callable, types: Sequence, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result
