"""A step of thinking for few queries, whose scores exist all at once: as few operations as it takes.

Rows (position, rationale, query head of the group) meet the text keys in one product per key/value head, and the keys
of their own rationale in a small one; one softmax is over both, and over the sink. A query sees its own key, whatever
the rules are, so that no row is without a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.torch.blocks import grouped, most_scores


def first_key(rules: Rules, position: int, tokens: int) -> int:
    """The first text key that the window leaves to token ``tokens - 1`` of a thought at ``position``."""
    return 0 if rules.window is None else max(0, position + tokens + 1 - rules.window)


def seen_from(rules: Rules, length: int, queries: int, tokens: int) -> int:
    """The first of ``length`` text keys that the window may leave to any of the ``queries`` positions.

    Of given ones only a CPU is asked for the least.
    """
    if rules.positions is None:
        least = length - queries
    else:
        least = int(rules.positions.min()) if rules.positions.device.type == "cpu" else 0
    return min(first_key(rules, least, tokens), length)


def serves(q: Tensor, k_text: Tensor, rules: Rules, tokens: int) -> bool:
    """Whether the scores of q [B, Hq, Nq, r, D] fit into one block."""
    seen = k_text.shape[2] - seen_from(rules, k_text.shape[2], q.shape[2], tokens)
    return q.shape[:4].numel() * seen <= most_scores(q.device)


def attend_step(q, k_text, v_text, k_own, v_own, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, Nq, r, Dv] and lse [B, Hq, Nq, r]; a query's own key is the last of k_own [B, Hkv, Nq, r, t, D].

    Nothing waits for the device.
    """
    queries, tokens = q.shape[2], k_own.shape[4]
    first = seen_from(rules, k_text.shape[2], queries, tokens)
    if first:
        k_text, v_text = k_text[:, :, first:], v_text[:, :, first:]
    if rules.window is not None and rules.window < tokens:
        k_own, v_own = k_own[..., tokens - rules.window :, :], v_own[..., tokens - rules.window :, :]
    if q.dtype != lse.dtype:
        q, k_text, v_text, k_own, v_own = (x.to(lse.dtype) for x in (q, k_text, v_text, k_own, v_own))

    batch, kv_heads, seen, width = k_text.shape
    shape = (batch, kv_heads, queries, q.shape[3], q.shape[1] // kv_heads)
    pairs, group, own, value_width = batch * kv_heads, shape[4], k_own.shape[4], v_text.shape[3]
    rows = grouped(q, kv_heads).reshape(pairs, -1, width)
    k_text, v_text = k_text.reshape(pairs, seen, width), v_text.reshape(pairs, seen, value_width)
    k_own, v_own = k_own.reshape(-1, own, width), v_own.reshape(-1, own, value_width)

    scores = rows.new_empty(pairs, rows.shape[1], seen + own + (rules.sinks is not None))
    text_scores, own_scores = scores[..., :seen], scores[..., seen : seen + own].view(-1, group, own)
    text_scores.baddbmm_(rows, k_text.mT, beta=0, alpha=rules.scale)
    torch.mul(torch.bmm(rows.reshape(-1, group, width), k_own.mT), rules.scale, out=own_scores)
    if rules.softcap is not None:
        scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
    hide_text(text_scores.view(*shape[:3], shape[3] * group, seen), first, tokens, rules)
    if rules.sinks is not None:
        scores.view(*shape, -1)[..., -1] = rules.sinks.view(kv_heads, 1, 1, group)

    peak = scores.amax(dim=-1)
    torch.softmax(scores, -1, out=scores)  # from here on they are weights, the largest of a row 1 / sum of e^(s - peak)
    lse_rows = peak.sub_(scores.amax(dim=-1).log_())
    mean = torch.bmm(text_scores, v_text)
    mean.view(-1, group, value_width).baddbmm_(own_scores, v_own)
    grouped(out, kv_heads).copy_(mean.view(*shape, value_width))
    grouped(lse, kv_heads).copy_(lse_rows.view(shape))


def hide_text(scores: Tensor, first: int, tokens: int, rules: Rules) -> None:
    """Hide from scores [B, Hkv, Nq, rows, keys] what follows their position, and what the rules hide before it.

    The keys are those from ``first`` on.
    """
    queries, length = scores.shape[2], first + scores.shape[4]
    windowed = first_key(rules, length - 1, tokens) > first
    starts = rules.starts(length, queries)
    if windowed or starts is not None or rules.positions is not None:
        if rules.positions is None:
            position = torch.arange(length - queries, length, device=scores.device)[:, None]
        else:
            position = rules.positions[:, None, :, None]
        key = torch.arange(first, length, device=scores.device)
        hidden = key > position
        if windowed:
            hidden |= key < position + (tokens + 1 - rules.window)
        if starts is not None:
            hidden = hidden | (key < starts[:, None, :, None])
        scores.masked_fill_(hidden.unsqueeze(-2), -torch.inf)
    elif queries > 1:
        future = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu_(1)
        scores[..., -queries:].masked_fill_(future[:, None], -torch.inf)
