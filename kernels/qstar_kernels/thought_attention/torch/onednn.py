"""Attention to the text keys by oneDNN's products, on CPUs where they are faster than torch's flash attention.

Scores lie as [keys, rows], so that every product takes its factors as they lie in memory, and what is taken from all
scores of a row is a bias. Their exponentials are made by the product as well: oneDNN has no exp to end one with, but
a logistic function, and 1 / (1 + e^-x) is e^x within a rounding for x <= -SHIFT. With s the scores and h a whole number
of each row, so that nothing is lost in sums with it:

    forward     w = e^(s - h - SHIFT)    out = w v / sum w    lse = log(sum w) + h + SHIFT       h >= max s
    backward    p = w e^(h - lse + SHIFT)                                                        h = ceil(lse)
                dv = p^T do    ds = p (do v^T - delta)    dq = ds k    dk = ds^T q

In the forward h is a bound on the row's scores by the lengths of its query and of the keys that it sees, and where that
is so large that e^(s - h) could vanish, the largest score. It never depends on what a row does not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qstar_kernels import products
from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.torch.blocks import grouped

SCORES = 2**19  # at once, about: they stay in the caches
LEAST_SCORES = 2**22  # of a key/value head: with fewer, the calls cost what they save
SHIFT = 17.0  # e^-17 is less than half of the distance from 1 to the next float32
LARGEST_BOUND = 35.0  # e^(-2 * 35 - 17) is still a normal float32


def serves(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> bool:
    """Whether q [B, Hq, N, C, D] at the last positions meet the keys k [B, Hkv, S, D] faster so, as things stand."""
    if rules.positions is not None:
        return False
    scores = q.shape[1] // k.shape[1] * q.shape[2] * q.shape[3] * k.shape[2]
    enough = scores >= LEAST_SCORES and q.shape[4] >= products.LEAST_SIZE
    return enough and products.is_chosen() and products.is_ordinary(q, k, v)


class Block:
    """Some positions of one sequence and key/value head, as rows (position, slot, query head of the group).

    Attributes:
        here: the positions.
        seen: how many keys they see together; the last ``size`` of them are the positions' own.
        hidden: which of these last keys a row does not see, [size, R].
    """

    def __init__(self, start: int, stop: int, before: int, future: Tensor, width: int):
        self.here, self.seen, self.size = slice(start, stop), before + stop, stop - start
        self.hidden = future[: self.size, : self.size * width].contiguous()
        self.width = width

    def rows(self, x: Tensor) -> Tensor:
        """Those of x [N, C, G, D], [R, D]."""
        return x[self.here].reshape(-1, x.shape[-1])

    def fill(self, x: Tensor, columns: Tensor, total: Tensor | None = None) -> None:
        """Write columns [D, R], over ``total`` [R] if there is one, into x [N, C, G, D]."""
        target = x[self.here]
        rows = columns.t().contiguous().view(target.shape)
        target.copy_(rows) if total is None else torch.div(rows, total.view(*target.shape[:-1], 1), out=target)

    def weights(self, keys: Tensor, rows: Tensor, shift: Tensor) -> Tensor:
        """e^(s - shift) of the scores s of keys [S, D], [seen, R]; no exponent is above -SHIFT."""
        weights = products.multiply(keys[: self.seen], rows, -shift, "sigmoid")
        weights[-self.size :].masked_fill_(self.hidden, 0.0)
        return weights

    def bounds(self, keys: Tensor, longest: Tensor, rows: Tensor) -> Tensor:
        """For each row a whole number that none of its scores exceeds, [R].

        ``longest`` [S] holds for each of the keys [S, D] the largest length of those up to it.
        """
        own = longest[self.seen - self.size : self.seen].repeat_interleave(self.width)
        bounds = torch.linalg.vector_norm(rows, dim=-1).mul_(own).ceil_()
        loose = bounds > LARGEST_BOUND
        if loose.any():
            scores = products.multiply(keys[: self.seen], rows)
            scores[-self.size :].masked_fill_(self.hidden, -torch.inf)
            bounds = torch.where(loose, scores.amax(0).ceil_(), bounds)
        return bounds


def blocks(q: Tensor, k: Tensor) -> list[Block]:
    """Those of every key/value head of q [B, Hq, N, C, D] and k [B, Hkv, S, D], each with about ``SCORES`` scores."""
    positions, width = q.shape[2], q.shape[1] // k.shape[1] * q.shape[3]
    before, start, bounds = k.shape[2] - positions, 0, []
    while start < positions:
        first = before + start
        stop = start + max(1, int(((first**2 + 4 * SCORES / width) ** 0.5 - first) / 2))
        bounds.append((start, min(stop, positions)))
        start = stop
    largest = max(stop - start for start, stop in bounds)
    position = torch.arange(largest)
    future = position[:, None] > position.repeat_interleave(width)
    return [Block(start, stop, before, future, width) for start, stop in bounds]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, N, C, Dv] and lse [B, Hq, N, C] with those of the text keys k [B, Hkv, S, D]."""
    parts = blocks(q, k)
    for tensors in pairs(k.shape[1], q, k, v, out, lse[..., None]):
        attend_pair(*tensors, scale, parts)


def attend_pair(q, k, v, out, lse, scale: float, parts: list[Block]) -> None:
    keys = k * scale
    longest = torch.linalg.vector_norm(keys, dim=-1).cummax(0).values
    values = torch.cat([v.mT, v.new_ones(1, len(v))])
    for block in parts:
        rows = block.rows(q)
        shift = block.bounds(keys, longest, rows).add_(SHIFT)
        sums = products.multiply(values[:, : block.seen], block.weights(keys, rows, shift).t())
        block.fill(out, sums[:-1], sums[-1])
        block.fill(lse, sums[-1:].double().log_().add_(shift).float())


def attend_backward(do, out, lse, q, k, v, scale: float, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fill dq [B, Hq, N, C, D], and add to dk and dv of the text keys [B, Hkv, S, D].

    out and lse may be those of further keys as well.
    """
    parts = blocks(q, k)
    for tensors in pairs(k.shape[1], do, out, lse[..., None], q, k, v, dq, dk, dv):
        pair_backward(*tensors, scale, parts)


def pair_backward(do, out, lse, q, k, v, dq, dk, dv, scale: float, parts: list[Block]) -> None:
    keys, v = k * scale, v.contiguous()
    for block in parts:
        rows, lse_rows = block.rows(q), block.rows(lse)[:, 0]
        whole = lse_rows.ceil()
        d_out = block.rows(do) * (whole - lse_rows).exp_().mul_(math.exp(SHIFT))[:, None]
        delta = (d_out * block.rows(out)).sum(-1)
        weights = block.weights(keys, rows, whole + SHIFT)
        dv[: block.seen] += products.multiply(weights, d_out.t())
        d_scores = products.multiply(v[: block.seen], d_out, -delta).mul_(weights)
        dk[: block.seen].add_(products.multiply(d_scores, rows.t()), alpha=scale)
        block.fill(dq, products.multiply(keys[: block.seen].t(), d_scores.t()))


def pairs(kv_heads: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Of every sequence and key/value head: q and its like as [N, C, G, ...], keys and values as [S, ...]."""
    parts = [grouped(x, kv_heads) if x.dim() == 5 else x for x in tensors]
    for sequence in range(len(tensors[0])):
        for head in range(kv_heads):
            yield [x[sequence, head] for x in parts]
