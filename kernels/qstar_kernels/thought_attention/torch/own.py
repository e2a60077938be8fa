"""Attention of a thought's tokens to each other by batched products, on a CPU.

torch's flash attention makes a product for each head and each position, and with as few tokens as a thought has a call
costs more than its product. Here a product is that of all query heads of a key/value head, and one call makes those of
many positions.

Tensors are [B, H, N, T, D], views of the T slots of one rationale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MOST_TOKENS = 32  # with more, flash attention is as fast
NUMBERS = 2**19  # of the queries at once, about: what is made of them stays in the caches


def serves(q: Tensor) -> bool:
    """Whether the slots of a rationale, q [B, Hq, N, T, D], go faster so than by flash attention."""
    return q.device.type == "cpu" and q.shape[3] <= MOST_TOKENS


class Block:
    """Some positions, as matrices of a sequence, position and key/value head each, of rows (query head, token)."""

    def __init__(self, here: slice, kv_heads: int):
        self.here, self.kv_heads = here, kv_heads

    def matrices(self, x: Tensor) -> Tensor:
        """Those of x [B, H, N, T, D], [B*n*Hkv, rows, D]."""
        rows = x[:, :, self.here].unflatten(1, (self.kv_heads, -1))  # [B, Hkv, G, n, T, D]
        return rows.permute(0, 3, 1, 2, 4, 5).reshape(-1, rows.shape[2] * rows.shape[4], rows.shape[5])

    def place(self, x: Tensor, like: Tensor) -> Tensor:
        """Matrices [B*n*Hkv, rows, D] back to [B, H, n, T, D], a view; ``like`` [B, H, N, T, ...] gives B, H and T."""
        batch, heads, _, tokens = like.shape[:4]
        rows = x.view(batch, -1, self.kv_heads, heads // self.kv_heads, tokens, x.shape[-1])
        return rows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def scores_of(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Of matrices [M, rows, D] of queries and [M, T, D] of keys, [M, T, rows]: -inf where the key is a later token."""
    tokens = keys.shape[1]
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=keys.device).tril(-1)
    scores = torch.baddbmm(keys.new_zeros(()), keys, queries.mT, beta=0, alpha=scale)
    return scores.masked_fill_(future.repeat(1, queries.shape[1] // tokens), -torch.inf)


def blocks(q: Tensor, k: Tensor) -> Iterator[Block]:
    """Those of q [B, Hq, N, T, D] and k [B, Hkv, N, T, D]."""
    batch, heads, positions, tokens, width = q.shape
    size = max(1, NUMBERS // (batch * heads * tokens * width))
    for start in range(0, positions, size):
        yield Block(slice(start, min(start + size, positions)), k.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(positions, out [B, Hq, n, T, D], lse [B, Hq, n, T]), a block of positions at a time."""
    for block in blocks(q, k):
        scores = scores_of(block.matrices(q), block.matrices(k), scale)
        largest = scores.amax(1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(1, keepdim=True)
        out = torch.bmm(weights.div_(total).mT, block.matrices(v))
        lse = total.log_().add_(largest)
        yield block.here, block.place(out, q), block.place(lse.mT, q)[..., 0]


def attend_backward(do, out, lse, q, k, v, scale: float, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Add to dq, and fill dk and dv; out and lse [B, Hq, N, T] may be those of further keys as well."""
    for block in blocks(q, k):
        queries, keys, values, d_out = (block.matrices(x) for x in (q, k, v, do))
        weights = scores_of(queries, keys, scale).sub_(block.matrices(lse[..., None]).mT).exp_()
        delta = (d_out * block.matrices(out)).sum(-1, keepdim=True)
        d_scores = torch.baddbmm(delta.mT, values, d_out.mT, beta=-1).mul_(weights)
        here = block.here
        dq[:, :, here].add_(block.place(torch.bmm(d_scores.mT, keys), q), alpha=scale)
        dk[:, :, here] = block.place(torch.bmm(d_scores, queries).mul_(scale), k)
        dv[:, :, here] = block.place(torch.bmm(weights, d_out), v)
