"""Thought attention in plain PyTorch: memory linear in N, an exact backward pass, any device.

What torch's flash attention can express goes through it; everything else goes by blocks of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels.thought_attention import blocked, flash
from qstar_kernels.thought_attention.blocks import Rules


def split_slots(x: Tensor, rationales: int) -> tuple[Tensor, Tensor | None]:
    """[B, H, N, C, D] -> text [B, H, N, D] and thoughts [B, H, N, r, T, D], None where there are none."""
    return x[..., 0, :], None if x.shape[3] == 1 else x[..., 1:, :].unflatten(3, (rationales, -1))


def like_input(x: Tensor, width: int) -> Tensor:
    """An empty [B, H, N, C, width] laid out as x is: heads inside slots, or slots inside heads."""
    batch, heads, positions, slots, _ = x.shape
    if x.stride(1) < x.stride(3):
        return x.new_empty(batch, positions, slots, heads, width).permute(0, 3, 1, 2, 4)
    return x.new_empty(batch, heads, positions, slots, width)


def empty_results(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return like_input(q, width), lse


def unit_stride(x: Tensor) -> Tensor:
    """x with neighbours in memory along its last axis, as products want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def sinks_gradient(do: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """A sink's weight times the gradient of its score: it has no value, so that is minus delta."""
    if sinks is None:
        return None
    delta = (do.to(lse.dtype) * out).sum(dim=-1)
    weight = torch.exp(sinks.to(lse.dtype)[:, None, None] - lse)
    return -(weight * delta).sum(dim=(0, 2, 3)).to(sinks.dtype)


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, rationales, rules):
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        out, lse = empty_results(q, v.shape[-1])
        ctx.flash = flash.expressible(q, v, rules)
        if ctx.flash:
            flash.attend(q, k, v, rationales, rules, out, lse)
        elif out.numel():
            (k_text, k_own), (v_text, v_own) = split_slots(k, rationales), split_slots(v, rationales)
            blocked.attend(q, k_text, v_text, k_own, v_own, rules, 0, out, lse)
        ctx.save_for_backward(q, k, v, out, lse, sinks, rules.text_start)
        ctx.rationales, ctx.rules = rationales, rules._replace(sinks=None, text_start=None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k, v, out, lse, sinks, text_start = ctx.saved_tensors
        do, rationales = unit_stride(do), ctx.rationales
        rules = ctx.rules._replace(sinks=sinks, text_start=text_start)
        dq, dk, dv = (like_input(x, x.shape[-1]) for x in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            if ctx.flash:
                flash.attend_backward(do, out, lse, q, k, v, rationales, rules, dq, dk, dv)
            elif out.numel():
                (k_text, k_own), (v_text, v_own) = split_slots(k, rationales), split_slots(v, rationales)
                (dk_text, dk_own), (dv_text, dv_own) = split_slots(dk, rationales), split_slots(dv, rationales)
                grads = (dq, dk_text, dv_text, dk_own, dv_own)
                blocked.attend_backward(do, out, lse, q, k_text, v_text, k_own, v_own, rules, 0, grads)
        return dq, dk, dv, sinks_gradient(do, out, lse, sinks), None, None


class StepAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k_text, v_text, k_own, v_own, sinks, rules):
        out, lse = empty_results(q, v_text.shape[-1])
        if q.shape[2] == k_text.shape[2] and flash.expressible(q, v_text, rules):
            flash.attend_step(q, k_text, v_text, k_own, v_own, rules, out, lse)
        elif out.numel():
            blocked.attend(q, k_text, v_text, k_own, v_own, rules, k_own.shape[4] - 1, out, lse)
        ctx.save_for_backward(q, k_text, v_text, k_own, v_own, out, lse, sinks, rules.text_start)
        ctx.rules = rules._replace(sinks=None, text_start=None)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q, k_text, v_text, k_own, v_own, out, lse, sinks, text_start = ctx.saved_tensors
        inputs = (q, k_text, v_text, k_own, v_own)
        rules = ctx.rules._replace(sinks=sinks, text_start=text_start)
        grads = tuple(torch.zeros_like(x) for x in inputs)
        if out.numel():
            with torch.autocast(q.device.type, enabled=False):
                blocked.attend_backward(do, out, lse, *inputs, rules, k_own.shape[4] - 1, grads)
        return *grads, sinks_gradient(do, out, lse, sinks), None


def needed(rules: Rules, positions: int, tokens: int) -> Rules:
    """The rules without those that hide nothing."""
    if rules.window is not None and rules.window >= positions + tokens:
        rules = rules._replace(window=None)
    if rules.text_start is not None and not (rules.text_start > 0).any():
        rules = rules._replace(text_start=None)
    return rules


def thought_attention(q, k, v, rationales, scale, window, softcap, sinks, text_start) -> tuple[Tensor, Tensor]:
    rules = needed(Rules(scale, window, softcap, sinks, text_start), q.shape[2], (q.shape[3] - 1) // rationales)
    return PackedAttention.apply(q, k, v, sinks, rationales, rules)


def thought_attention_step(
    q, k_text, v_text, k_thought, v_thought, step, scale, window, softcap, sinks, text_start
) -> tuple[Tensor, Tensor]:
    k_own, v_own = k_thought[..., : step + 1, :], v_thought[..., : step + 1, :]
    rules = needed(Rules(scale, window, softcap, sinks, text_start), k_text.shape[2], step + 1)
    return StepAttention.apply(q, k_text, v_text, k_own, v_own, sinks, rules)
