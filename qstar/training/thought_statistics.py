"""Whether thoughts are still of many kinds: entropy, share of distinct ones, and repetition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLLAPSED = {  # each a bound, and whether values below it show a collapse, or above it
    "thought_entropy": (0.5, "below"),
    "distinct_thoughts": (0.1, "below"),
    "thought_repetition": (0.9, "above"),
}
HASH = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, as an int64; products wrap around


class ThoughtStatistics:
    """Sums over thoughts, on their device, which is never waited for before :meth:`summary`.

    They do not depend on how rows are split into batches and processes.
    """

    def __init__(self) -> None:
        self._tokens: Tensor | None = None  # how often each was sampled, [V]
        self._sums: Tensor | None = None  # [4]: thoughts, distinct ones, tokens after a first, those that repeat one

    def add(self, thoughts: Tensor, counted: Tensor, vocabulary: int) -> None:
        """Count thoughts.

        Args:
            thoughts: ``[B, N, r, K]`` int64.
            counted: whether those at a position count, ``[B, N]`` bool: not where there is padding.
            vocabulary: V; tokens are below it.
        """
        each = counted[..., None].expand(thoughts.shape[:3])
        if self._tokens is None or self._sums is None:
            self._tokens = torch.zeros(vocabulary, dtype=torch.int64, device=thoughts.device)
            self._sums = torch.zeros(4, dtype=torch.int64, device=thoughts.device)
        self._tokens.scatter_add_(0, thoughts.flatten(), each[..., None].expand_as(thoughts).flatten().long())
        repeated = same_as_before(thoughts) * each
        further = each.sum() * (thoughts.shape[-1] - 1)
        self._sums += torch.stack([each.sum(), distinct(thoughts, each), further, repeated.sum()])

    def summary(self, total: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """The statistics of all that was counted since the last call, by name; empty where nothing was.

        ``thought_entropy`` is that of the sampled tokens, nats; ``distinct_thoughts`` the number of different thoughts
        in a row over that of all in it; ``thought_repetition`` the share of a thought's tokens after its first that
        stand in it already.

        Args:
            total: adds counts over all processes; the identity by default.
        """
        if self._tokens is None or self._sums is None:
            return {}
        counts = total(torch.cat([self._tokens, self._sums]))
        self._tokens, self._sums = None, None
        tokens, (thoughts, different, further, repeated) = counts[:-4].double(), counts[-4:].tolist()
        shares = tokens / tokens.sum().clamp(min=1)
        return {
            "thought_entropy": float(torch.special.entr(shares).sum()),
            "distinct_thoughts": different / max(thoughts, 1),
            "thought_repetition": repeated / max(further, 1),
        }


def same_as_before(thoughts: Tensor) -> Tensor:
    """How many tokens of each thought stand in it already, ``[B, N, r]`` int64, of thoughts ``[B, N, r, K]``."""
    ordered = thoughts.sort(-1).values
    return (ordered[..., 1:] == ordered[..., :-1]).sum(-1)


def distinct(thoughts: Tensor, counted: Tensor) -> Tensor:
    """How many different thoughts the rows hold, ``[]`` int64, each row by itself.

    Args:
        thoughts: ``[B, N, r, K]`` int64. Two that differ have one hash in 2^64.
        counted: which of them count, ``[B, N, r]`` bool.
    """
    hashes = torch.zeros_like(thoughts[..., 0])
    for token in thoughts.unbind(-1):
        hashes = (hashes ^ (token + 1)) * HASH
        hashes = hashes ^ (hashes >> 29)
    nothing = torch.iinfo(torch.int64).max  # comes last, and is no thought
    ordered = torch.where(counted, hashes, nothing).flatten(1).sort(1).values
    begins = torch.cat([torch.ones_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] != ordered[:, :-1]], dim=1)
    return (begins & (ordered != nothing)).sum()


def signs_of_collapse(values: dict[str, float]) -> list[str]:
    """What among logged values shows that thoughts have collapsed, in words."""
    return [
        f"{name} is {values[name]:.3f}, {side} {bound}"
        for name, (bound, side) in COLLAPSED.items()
        if name in values and (values[name] < bound if side == "below" else values[name] > bound)
    ]
