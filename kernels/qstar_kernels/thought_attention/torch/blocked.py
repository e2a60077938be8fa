"""Thought attention by blocks of positions: any rule, any device, no score matrix larger than one block's.

Forward, for a block of rows with text scores s, own scores w and sink z:

    peak = max(s, w, z)     total = sum e^(s - peak) + sum e^(w - peak) + e^(z - peak)
    out = (e^(s - peak) v_text + e^(w - peak) v_own) / total        lse = peak + log(total)

Backward recomputes the weights p = e^(s - lse) from the merged lse and takes delta = <do, out> from the merged output:

    dv = p^T do     ds = p (do v^T - delta)     dq = ds k     dk = ds^T q     dz = -sum e^(z - lse) delta
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.torch.blocks import BlockedScores, grouped


def attend(q, k_text, v_text, k_own, v_own, rules: Rules, first_token: int, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, M, S, Dv] and lse [B, Hq, M, S]."""
    blocked = BlockedScores(q, k_text, k_own, rules, first_token)
    v_text = blocked.flat_keys(v_text)
    out_blocks, lse_blocks = grouped(out, blocked.kv_heads), grouped(lse[..., None], blocked.kv_heads)
    finfo, work = torch.finfo(blocked.dtype), blocked.workspace()
    for block in blocked.blocks:
        rows = blocked.rows(blocked.q, block)
        scores = blocked.text_scores(rows, block, work)
        peak = scores.amax(dim=-1, keepdim=True)
        if k_own is not None:
            own_scores = blocked.own_scores(rows, block)
            own_peak = blocked.own_rows(peak)
            own_peak.copy_(torch.maximum(own_peak, own_scores.amax(dim=-1, keepdim=True)))
        if rules.sinks is not None:
            sinks = blocked.sink_rows(block)
            torch.maximum(peak, sinks, out=peak)
        peak.clamp_(min=finfo.min)

        weights = scores.sub_(peak).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        mean = torch.bmm(weights, v_text[block.pairs, block.keys])
        if k_own is not None:
            own_weights = own_scores.sub_(own_peak).exp_()
            blocked.own_rows(total).add_(own_weights.sum(dim=-1, keepdim=True))
            blocked.own_rows(mean).add_(own_weights @ blocked.own_keys(v_own, block))
        if rules.sinks is not None:
            total += (sinks - peak).exp_()

        target = out_blocks[block.queries]
        torch.div(mean.view(target.shape), total.clamp(min=finfo.tiny).view(*target.shape[:-1], 1), out=target)
        lse_blocks[block.queries] = total.log_().add_(peak).view(*target.shape[:-1], 1)


def attend_backward(do, out, lse, q, k_text, v_text, k_own, v_own, rules: Rules, first_token: int, grads) -> None:
    """Fill ``grads``, which are shaped like q, k_text, v_text, k_own and v_own."""
    dq, dk_text, dv_text, dk_own, dv_own = grads
    blocked = BlockedScores(q, k_text, k_own, rules, first_token)
    v = blocked.flat_keys(v_text)
    dk, dv = torch.zeros_like(blocked.k_text), torch.zeros_like(v)
    do, out, dq = (grouped(x, blocked.kv_heads) for x in (do, out, dq))
    lse = grouped(lse.clamp(min=torch.finfo(lse.dtype).min)[..., None], blocked.kv_heads)
    work, work_ds = blocked.workspace(), blocked.workspace()
    work_slope = None if rules.softcap is None else blocked.workspace()
    for block in blocked.blocks:
        rows, do_rows, lse_rows = (blocked.rows(x, block) for x in (blocked.q, do, lse))
        delta = (do_rows * blocked.rows(out, block)).sum(dim=-1, keepdim=True)

        slope = None if work_slope is None else blocked.in_workspace(work_slope, block)
        p = blocked.text_scores(rows, block, work, slope).sub_(lse_rows).exp_()
        dv[block.pairs, block.keys].baddbmm_(p.mT, do_rows)
        ds = torch.bmm(do_rows, v[block.pairs, block.keys].mT, out=blocked.in_workspace(work_ds, block))
        ds.sub_(delta).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        dk[block.pairs, block.keys].baddbmm_(ds.mT, rows)
        dq_rows = torch.bmm(ds, blocked.k_text[block.pairs, block.keys])

        if k_own is not None:
            own_do = blocked.own_rows(do_rows)
            own_slope = None if slope is None else rows.new_empty(0)
            p = blocked.own_scores(rows, block, own_slope).sub_(blocked.own_rows(lse_rows)).exp_()
            ds = (own_do @ blocked.own_keys(v_own, block).mT).sub_(blocked.own_rows(delta)).mul_(p)
            if own_slope is not None:
                ds.mul_(own_slope)
            target = dk_own[block.queries]
            target.copy_(((ds * rules.scale).mT @ blocked.own_rows(rows)).view(target.shape))
            dv_own[block.queries] = (p.mT @ own_do).view(*target.shape[:-1], -1)
            blocked.own_rows(dq_rows).add_(ds @ blocked.own_keys(k_own, block).mul(rules.scale))
        dq[block.queries] = dq_rows.view(dq[block.queries].shape)

    dk_text.copy_(dk.mul_(rules.scale).view(dk_text.shape))
    dv_text.copy_(dv.view(dv_text.shape))
