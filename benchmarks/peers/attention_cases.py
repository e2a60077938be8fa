"""What the attention benchmark times: sizes, inputs, the work that each call has to do, and what it must give.

A query-key pair that counts takes 4 D operations forward (two products) and 10 D more backward (five). The necessary
bytes are every input read once and every result written once, per pass. A pass cannot be faster than the larger of its
operations over the device's matrix rate and its bytes over the device's bandwidth: the bound.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lab.device_limits import Limits
from qstar_kernels.reference import masked_attention, thought_visibility
from qstar_kernels.testing import AttentionCase, relative_error

CHECKED_POSITIONS = 64  # positions that the check takes at once
# For sanity: what is wrong is off by far more; some peers sum gradients in 16 bits. The tests hold ours to the rule.
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


class Work(NamedTuple):
    """One pass at one size.

    Attributes:
        kind: ``forward``, ``forward_backward`` or ``step`` (the newest token of every thought).
        filled: of a step, the tokens of its thought that a query sees, its own included.
    """

    case: AttentionCase
    kind: str
    filled: int = 0

    @property
    def name(self) -> str:
        return f"step {self.filled}" if self.kind == "step" else self.kind.replace("_", " + ")

    def phases(self, item_size: int) -> list[tuple[float, float]]:
        """Useful operations and necessary bytes of what runs one after the other."""
        case = self.case
        width, tokens, per_position = case.width, case.tokens, case.batch * case.positions
        if self.kind == "step":
            pairs = per_position * case.heads * ((case.positions + 1) / 2 + self.filled)
            rows = 2 * case.heads + 2 * case.kv_heads * (1 + self.filled)
            return [(4 * width * pairs, per_position * rows * width * item_size)]
        grid = per_position * (1 + tokens)
        forward = (4 * width * case.pairs, 2 * grid * (case.heads + case.kv_heads) * width * item_size)
        if self.kind == "forward":
            return [forward]
        lse = 4 * grid * case.heads
        return [forward, (10 * width * case.pairs, 2 * forward[1] + lse)]

    def useful_flops(self) -> float:
        return sum(flops for flops, _ in self.phases(1))

    @property
    def mask_entries(self) -> int:
        """Query-key pairs of the dense path's mask."""
        queries = self.case.positions * (1 if self.kind == "step" else self.case.slots)
        return queries * self.case.positions * (1 + (self.filled if self.kind == "step" else self.case.tokens))

    def bound(self, limits: Limits, item_size: int) -> dict[str, float]:
        """Milliseconds that no call can beat, and those of its operations and of its bytes alone."""
        seconds = [(flops / limits.matrix_flops, size / limits.bandwidth) for flops, size in self.phases(item_size)]
        return {
            "bound_ms": 1e3 * sum(max(phase) for phase in seconds),
            "matrix_ms": 1e3 * sum(matrix for matrix, _ in seconds),
            "memory_ms": 1e3 * sum(memory for _, memory in seconds),
        }


class Grid:
    """Random inputs of one size, laid out as a transformer has them (heads inside slots), and the right results.

    The right results are those of the last sequence's last key/value head and its query heads, in float64, block by
    block from the dense specification: overflows show there first, and a whole reference would fit at small sizes only.
    """

    def __init__(self, case: AttentionCase, dtype: torch.dtype, device: torch.device):
        assert case.rationales == 1, "the peers know one thought a position"
        self.case = case
        self.generator = torch.Generator(device).manual_seed(0)
        self.q = self._states(case.heads, dtype, device).requires_grad_()
        self.k, self.v = (self._states(case.kv_heads, dtype, device).requires_grad_() for _ in range(2))
        self.do = self._states(case.heads, dtype, device)

    def _states(self, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        shape = (self.case.batch, self.case.positions, self.case.slots, heads, self.case.width)
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=device).permute(0, 3, 1, 2, 4)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def caches(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the text, heads inside positions, and those of the thoughts, whole and contiguous."""
        k, v = self.k.detach(), self.v.detach()
        text = (x[:, :, :, 0].transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        return *text, *(x[:, :, :, None, 1:].contiguous() for x in (k, v))

    def step_inputs(self, filled: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q [B, Hq, N, 1, D] of token ``filled - 1``, and the caches."""
        q = self.q.detach()[:, :, :, filled].transpose(1, 2).contiguous().transpose(1, 2)[:, :, :, None]
        return q, *self.caches

    def _checked(self, x: Tensor) -> Tensor:
        """The sequence and the heads of x [B, H, ...] that are checked."""
        heads = x.shape[1] // self.case.kv_heads
        return x[-1:, -heads:]

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """out, dq, dk and dv of the checked heads."""
        slots, device = self.case.slots, self.q.device
        q, k, v = (self._checked(x).detach().double().requires_grad_() for x in self.leaves)
        do = self._checked(self.do).double()
        outs = []
        for start in range(0, self.case.positions, CHECKED_POSITIONS):
            stop = min(start + CHECKED_POSITIONS, self.case.positions)
            keys, values = (
                torch.cat([x[:, :, :stop, 0], x[:, :, start:stop, 1:].flatten(2, 3)], dim=2) for x in (k, v)
            )
            position = torch.arange(start, stop, device=device).repeat_interleave(slots)
            sees_text = torch.arange(stop, device=device) <= position[:, None]
            inside = thought_visibility(stop - start, slots, 1, None, None, device)
            sees_own = inside.unflatten(2, (-1, slots))[..., 1:].flatten(2)
            visible = torch.cat([sees_text[None], sees_own], dim=-1)
            rows = q[:, :, start:stop].flatten(2, 3)
            out = masked_attention(rows, keys, values, visible, None, None, None)[0].unflatten(2, (-1, slots))
            out.backward(do[:, :, start:stop])
            outs.append(out.detach())
        return torch.cat(outs, dim=2), q.grad, k.grad, v.grad

    def check(self, work: Work, results: tuple[Tensor, ...]) -> float:
        """The largest relative error of a pass's results; raises where they are wrong."""
        expected = self.expected[: len(results)]
        if work.kind == "step":
            expected = (expected[0][:, :, :, work.filled : work.filled + 1],)
        errors = [relative_error(self._checked(x), right) for x, right in zip(results, expected, strict=True)]
        limit = LARGEST_ERROR[self.q.dtype]
        if not max(errors) <= limit:
            listed = ", ".join(f"{error:.1e}" for error in errors)
            raise ArithmeticError(f"wrong: relative errors of out, dq, dk, dv are {listed}; the limit is {limit:.0e}")
        return max(errors)
