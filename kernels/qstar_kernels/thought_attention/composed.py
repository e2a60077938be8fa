"""Thought attention in PyTorch products: exact, on any device, no score matrix larger than one block's.

Forward, for a block of rows with text scores s, own scores w and sink z:

    peak = max(s, w, z)     total = sum e^(s - peak) + sum e^(w - peak) + e^(z - peak)
    out = (e^(s - peak) v_text + e^(w - peak) v_own) / total        lse = peak + log(total)

Backward recomputes the weights p = e^(s - lse) from the merged lse and takes delta = <do, out> from the merged output:

    dv = p^T do     ds = p (do v^T - delta)     dq = ds k     dk = ds^T q     dz = -sum e^(z - lse) delta
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels.thought_attention.blocks import BlockedScores, Rules, grouped


def like_input(x: Tensor, width: int) -> Tensor:
    """An empty [B, H, N, C, width] laid out as x is: heads inside slots, or slots inside heads."""
    batch, heads, positions, slots, _ = x.shape
    if x.stride(1) < x.stride(3):
        return x.new_empty(batch, positions, slots, heads, width).permute(0, 3, 1, 2, 4)
    return x.new_empty(batch, heads, positions, slots, width)


def attend(q, k_text, v_text, k_own, v_own, rules: Rules, first_token: int = 0) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, S, Dv] in q's dtype and lse [B, Hq, M, S]."""
    out = like_input(q, v_text.shape[-1])
    lse = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if not q.numel():
        return out.zero_(), lse.fill_(-torch.inf)

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
    return out, lse


def attend_backward(do, out, lse, q, k_text, v_text, k_own, v_own, rules: Rules, first_token: int, grads) -> Tensor | None:
    """Fill ``grads``, shaped like (q, k_text, v_text, k_own, v_own); returns the gradient of the sinks."""
    dq, dk_text, dv_text, dk_own, dv_own = grads
    dsinks = None if rules.sinks is None else torch.zeros_like(rules.sinks, dtype=lse.dtype)
    if not q.numel():
        for grad in grads:
            if grad is not None:
                grad.zero_()
        return None if dsinks is None else dsinks.to(rules.sinks.dtype)

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
        if dsinks is not None:
            share = (blocked.sink_rows(block) - lse_rows).exp_().mul_(delta)
            share = share.view(-1, block.heads.stop - block.heads.start, rows.shape[1] // blocked.group, blocked.group)
            dsinks.view(blocked.kv_heads, -1)[block.heads] -= share.sum(dim=(0, 2))
        dq[block.queries] = dq_rows.view(dq[block.queries].shape)

    dk_text.copy_(dk.mul_(rules.scale).view(dk_text.shape))
    dv_text.copy_(dv.view(dv_text.shape))
    return None if dsinks is None else dsinks.to(rules.sinks.dtype)


def split_slots(x: Tensor, rationales: int) -> tuple[Tensor, Tensor | None]:
    """[B, H, N, C, D] -> text [B, H, N, D] and thoughts [B, H, N, r, T, D], None where there are none."""
    return x[..., 0, :], None if x.shape[3] == 1 else x[..., 1:, :].unflatten(3, (rationales, -1))


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, rationales, rules):
        (k_text, k_own), (v_text, v_own) = split_slots(k, rationales), split_slots(v, rationales)
        out, lse = attend(q, k_text, v_text, k_own, v_own, rules)
        ctx.save_for_backward(q, k, v, out, lse, sinks, rules.text_start)
        ctx.rationales, ctx.rules = rationales, rules._replace(sinks=None, text_start=None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, out, lse, sinks, text_start = ctx.saved_tensors
        dq, dk, dv = (like_input(x, x.shape[-1]) for x in (q, k, v))
        (k_text, k_own), (dk_text, dk_own) = split_slots(k, ctx.rationales), split_slots(dk, ctx.rationales)
        (v_text, v_own), (dv_text, dv_own) = split_slots(v, ctx.rationales), split_slots(dv, ctx.rationales)
        rules = ctx.rules._replace(sinks=sinks, text_start=text_start)
        grads = (dq, dk_text, dv_text, dk_own, dv_own)
        with torch.autocast(q.device.type, enabled=False):
            dsinks = attend_backward(do, out, lse, q, k_text, v_text, k_own, v_own, rules, 0, grads)
        return dq, dk, dv, dsinks, None, None


class StepAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_text, v_text, k_own, v_own, sinks, rules):
        out, lse = attend(q, k_text, v_text, k_own, v_own, rules, k_own.shape[4] - 1)
        ctx.save_for_backward(q, k_text, v_text, k_own, v_own, out, lse, sinks, rules.text_start)
        ctx.rules = rules._replace(sinks=None, text_start=None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k_text, v_text, k_own, v_own, out, lse, sinks, text_start = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (q, k_text, v_text, k_own, v_own))
        rules = ctx.rules._replace(sinks=sinks, text_start=text_start)
        with torch.autocast(q.device.type, enabled=False):
            dsinks = attend_backward(
                do, out, lse, q, k_text, v_text, k_own, v_own, rules, k_own.shape[4] - 1, grads
            )
        return *grads, dsinks, None


def thought_attention(q, k, v, rationales, scale, window, softcap, sinks, text_start) -> tuple[Tensor, Tensor]:
    return PackedAttention.apply(q, k, v, sinks, rationales, Rules(scale, window, softcap, sinks, text_start))


def thought_attention_step(
    q, k_text, v_text, k_thought, v_thought, step, scale, window, softcap, sinks, text_start
) -> tuple[Tensor, Tensor]:
    k_own, v_own = k_thought[..., : step + 1, :], v_thought[..., : step + 1, :]
    rules = Rules(scale, window, softcap, sinks, text_start)
    return StepAttention.apply(q, k_text, v_text, k_own, v_own, sinks, rules)
