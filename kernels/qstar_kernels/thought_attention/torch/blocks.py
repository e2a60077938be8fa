"""How the queries are cut into blocks of positions, and what a block's scores are.

A block's rows are (position, slot, query head of the group), group head fastest. They meet the text keys that the
block may see in one product per key/value head, and the keys of their own rationale in small batched products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qstar_kernels.thought_attention.rules import Rules

SCORES_ON_CPU = 2**19
SCORES_ON_GPU = 2**26
ROWS = 128


class Block(NamedTuple):
    """Some positions' queries of some key/value heads of some sequences, and the text keys that they may see."""

    batch: slice
    heads: slice
    positions: slice
    keys: slice
    pairs: slice  # batch and heads on the flat axis of both

    @property
    def size(self) -> int:
        return self.positions.stop - self.positions.start

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return self.batch, self.heads, self.positions


def grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, M, S, ...] -> [B, Hkv, M, S, G, ...], a view."""
    return x.view(x.shape[0], kv_heads, x.shape[1] // kv_heads, *x.shape[2:]).movedim(2, 4)


def most_scores(device: torch.device) -> int:
    """How many exist at once."""
    return SCORES_ON_CPU if device.type == "cpu" else SCORES_ON_GPU


class BlockedScores:
    """Scores of S slots at M text positions, those of ``rules``; the last r*t slots are tokens of r rationales.

    q [B, Hq, M, S, D], k_text [B, Hkv, N, D], k_own [B, Hkv, M, r, T, D] or None.
    first_token is the token that a rationale's first slot holds.
    """

    def __init__(self, q: Tensor, k_text: Tensor, k_own: Tensor | None, rules: Rules, first_token: int = 0):
        self.rules = rules
        self.device = q.device
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.batch, self.kv_heads, self.length = k_text.shape[:3]
        self.positions, self.slots = q.shape[2:4]
        self.group = q.shape[1] // self.kv_heads
        self.width = self.slots * self.group
        self.offset = self.length - self.positions
        self.rationales, self.keys = (0, 0) if k_own is None else k_own.shape[3:5]
        self.tokens = self.keys - first_token

        self.q, self.k_own = grouped(q, self.kv_heads), k_own
        self.k_text = self.flat_keys(k_text) * rules.scale
        self.own_hidden = self._own_hidden(first_token)
        self.first_key = self._first_key(first_token)
        if self.first_key is not None:
            self.earliest = self.first_key.amin(dim=(0, 2)).tolist()
            self.latest = self.first_key.amax(dim=(0, 2)).tolist()
        if rules.positions is not None:
            self.nearest, self.furthest = (x.tolist() for x in torch.aminmax(rules.positions, dim=0))
        self.blocks = list(self._blocks())
        if rules.positions is None:
            largest = max(block.size for block in self.blocks)
            position = torch.arange(largest, device=self.device)
            self.future = position > position.repeat_interleave(self.width)[:, None]

    def _own_hidden(self, first_token: int) -> Tensor | None:
        """[t*G, T]: which keys of its own rationale a token does not see, None where it sees them all."""
        window = self.rules.window
        if self.tokens <= 1 and (window is None or self.keys <= window):
            return None
        token = torch.arange(first_token, self.keys, device=self.device).repeat_interleave(self.group)
        age = token[:, None] - torch.arange(self.keys, device=self.device)
        return (age < 0) if window is None else (age < 0) | (age >= window)

    def _first_key(self, first_token: int) -> Tensor | None:
        """[B or 1, M, S]: the first text key that each query sees, None where that is the first of all."""
        window, start = self.rules.window, self.rules.text_start
        if window is None and start is None:
            return None
        first = torch.zeros(1, 1, 1, dtype=torch.int64, device=self.device)
        if start is not None:
            first = torch.maximum(first, self.rules.starts(self.length, self.positions)[..., None])
        if window is not None:
            if self.rules.positions is None:
                position = torch.arange(self.offset, self.length, device=self.device)[:, None]
            else:
                position = self.rules.positions[..., None]
            token = torch.arange(first_token + 1, self.keys + 1, device=self.device).repeat(self.rationales)
            slot = torch.cat([token.new_zeros(self.slots - len(token)), token])
            first = torch.maximum(first, position + slot - (window - 1))
        return first.expand(-1, self.positions, self.slots)

    def _blocks(self) -> Iterator[Block]:
        """Blocks of about equally many scores: many positions where few keys precede them."""
        limit = most_scores(self.device)
        pairs = max(1, limit // (max(ROWS, self.width) * self.length))
        heads = min(pairs, self.kv_heads)
        batch = min(pairs // heads, self.batch)
        area = limit / (batch * heads * self.width)
        for b in range(0, self.batch, batch):
            for h in range(0, self.kv_heads, heads):
                in_batch = slice(b, min(b + batch, self.batch))
                in_heads = slice(h, min(h + heads, self.kv_heads))
                in_pairs = slice(b * self.kv_heads + h, (in_batch.stop - 1) * self.kv_heads + in_heads.stop)
                start = 0
                while start < self.positions:
                    stop, end = self._end(start, area)
                    first = 0 if self.first_key is None else min(*self.earliest[start:stop], end - 1)
                    yield Block(in_batch, in_heads, slice(start, stop), slice(first, end), in_pairs)
                    start = stop

    def _end(self, start: int, area: float) -> tuple[int, int]:
        """Where a block from ``start`` on ends, with ``area`` pairs of a position and a key, and where its keys end."""
        if self.rules.positions is None:
            before = self.offset + start
            size = max(1, int(((before**2 + 4 * area) ** 0.5 - before) / 2))
            stop = min(start + size, self.positions)
            return stop, self.offset + stop
        stop, end = start + 1, self.furthest[start] + 1
        while stop < self.positions:
            further = max(end, self.furthest[stop] + 1)
            if (stop + 1 - start) * further > area:
                break
            stop, end = stop + 1, further
        return stop, end

    def workspace(self) -> Tensor:
        """Room for the text scores of any block."""
        sizes = [(b.pairs.stop - b.pairs.start) * b.size * (b.keys.stop - b.keys.start) for b in self.blocks]
        return torch.empty(max(sizes) * self.width, dtype=self.dtype, device=self.device)

    def in_workspace(self, work: Tensor, block: Block) -> Tensor:
        """[pairs, rows, keys] for the text scores of ``block``."""
        shape = (block.pairs.stop - block.pairs.start, block.size * self.width, block.keys.stop - block.keys.start)
        return work[: shape[0] * shape[1] * shape[2]].view(shape)

    def flat_keys(self, x: Tensor) -> Tensor:
        """[B, Hkv, N, D] -> [pairs, N, D]."""
        return x.to(self.dtype).reshape(-1, *x.shape[2:])

    def rows(self, x: Tensor, block: Block) -> Tensor:
        """A block of x [B, Hkv, M, S, G, D] as rows [pairs, rows, D]."""
        x = x[block.queries].to(self.dtype)
        return x.reshape(-1, block.size * self.width, x.shape[-1]).contiguous()

    def own_keys(self, x: Tensor, block: Block) -> Tensor:
        """A block of x [B, Hkv, M, r, T, D] as [pairs * positions, r, T, D]."""
        return x[block.queries].to(self.dtype).flatten(0, 2)

    def own_rows(self, rows: Tensor) -> Tensor:
        """The rationales' rows of rows [pairs, rows, D]: a view [pairs * positions, r, t*G, D]."""
        own = self.tokens * self.group
        rows = rows.view(-1, self.width, rows.shape[-1])[:, self.width - self.rationales * own :]
        return rows.unflatten(1, (self.rationales, own))

    def text_scores(self, rows: Tensor, block: Block, work: Tensor, slope: Tensor | None = None) -> Tensor:
        """[pairs, rows, keys], -inf where hidden; ``slope`` receives the soft-cap's derivative."""
        scores = torch.bmm(rows, self.k_text[block.pairs, block.keys].mT, out=self.in_workspace(work, block))
        self._cap(scores, slope)
        self._hide_future(scores, block)
        if self.first_key is not None:
            self._hide_past(scores, block)
        return scores

    def _hide_future(self, scores: Tensor, block: Block) -> None:
        if self.rules.positions is None:
            new = min(block.size, scores.shape[-1])
            future = self.future[: block.size * self.width, block.size - new : block.size]
            scores[..., scores.shape[-1] - new :].masked_fill_(future, -torch.inf)
            return
        here = self.rules.positions[block.batch, block.positions]
        begin = max(block.keys.start, min(self.nearest[block.positions]) + 1)
        key = torch.arange(begin, block.keys.stop, device=self.device)
        future = key > here.repeat_interleave(self.width, dim=1)[:, None, :, None]
        by_head = scores.unflatten(0, (-1, block.heads.stop - block.heads.start))
        by_head[..., begin - block.keys.start :].masked_fill_(future, -torch.inf)

    def _hide_past(self, scores: Tensor, block: Block) -> None:
        past = min(max(self.latest[block.positions]), block.keys.stop) - block.keys.start
        if past <= 0:
            return
        batch = block.batch if len(self.first_key) > 1 else slice(None)
        first = self.first_key[batch, block.positions].repeat_interleave(self.group, dim=2).flatten(1)[:, None, :, None]
        key = torch.arange(block.keys.start, block.keys.start + past, device=self.device)
        by_head = scores.unflatten(0, (-1, block.heads.stop - block.heads.start))
        by_head[..., :past].masked_fill_(key < first, -torch.inf)

    def own_scores(self, rows: Tensor, block: Block, slope: Tensor | None = None) -> Tensor:
        """[pairs * positions, r, t*G, T], -inf where hidden; ``slope`` receives the soft-cap's derivative."""
        scores = self.own_rows(rows) @ (self.own_keys(self.k_own, block) * self.rules.scale).mT
        self._cap(scores, slope)
        return scores if self.own_hidden is None else scores.masked_fill_(self.own_hidden, -torch.inf)

    def _cap(self, scores: Tensor, slope: Tensor | None) -> None:
        softcap = self.rules.softcap
        if softcap is None:
            return
        scores.div_(softcap).tanh_()
        if slope is not None:
            torch.mul(scores, scores, out=slope).neg_().add_(1)
        scores.mul_(softcap)

    def sink_rows(self, block: Block) -> Tensor:
        """[pairs, rows, 1]: every row's sink."""
        sinks = self.rules.sinks.to(self.dtype).view(self.kv_heads, 1, self.group)[block.heads]
        sinks = sinks.expand(block.batch.stop - block.batch.start, -1, block.size * self.slots, -1)
        return sinks.reshape(-1, block.size * self.width, 1)
