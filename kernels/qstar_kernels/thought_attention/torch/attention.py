"""Thought attention in plain PyTorch: memory linear in N, an exact backward pass, any device.

A step for few queries goes directly. What torch's flash attention can express goes through it; everything else goes
by blocks of positions.
"""

from __future__ import annotations

from torch import Tensor

from qstar_kernels.thought_attention.rules import Rules
from qstar_kernels.thought_attention.torch import blocked, direct, flash


def split_slots(x: Tensor, rationales: int) -> tuple[Tensor, Tensor | None]:
    """[B, H, N, C, D] -> text [B, H, N, D] and thoughts [B, H, N, r, T, D], None where there are none."""
    return x[..., 0, :], None if x.shape[3] == 1 else x[..., 1:, :].unflatten(3, (rationales, -1))


def needed(rules: Rules, positions: int, tokens: int) -> Rules:
    """The rules without those that hide nothing."""
    rules = rules.within(positions, tokens)
    if rules.text_start is not None and not (rules.text_start > 0).any():
        rules = rules._replace(text_start=None)
    return rules


def needed_in_grid(rules: Rules, q: Tensor, rationales: int) -> Rules:
    return needed(rules, q.shape[2], (q.shape[3] - 1) // rationales)


def attend(q: Tensor, k: Tensor, v: Tensor, rationales: int, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, N, C, Dv] and lse [B, Hq, N, C]."""
    rules = needed_in_grid(rules, q, rationales)
    if flash.expressible(q, v, rules):
        flash.attend(q, k, v, rationales, rules, out, lse)
    elif out.numel():
        (k_text, k_own), (v_text, v_own) = split_slots(k, rationales), split_slots(v, rationales)
        blocked.attend(q, k_text, v_text, k_own, v_own, rules, 0, out, lse)


def attend_backward(do, out, lse, q, k, v, rationales: int, rules: Rules, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Fill dq, dk and dv."""
    rules = needed_in_grid(rules, q, rationales)
    if flash.expressible(q, v, rules):
        flash.attend_backward(do, out, lse, q, k, v, rationales, rules, dq, dk, dv)
    elif out.numel():
        (k_text, k_own), (v_text, v_own) = split_slots(k, rationales), split_slots(v, rationales)
        (dk_text, dk_own), (dv_text, dv_own) = split_slots(dk, rationales), split_slots(dv, rationales)
        grads = (dq, dk_text, dv_text, dk_own, dv_own)
        blocked.attend_backward(do, out, lse, q, k_text, v_text, k_own, v_own, rules, 0, grads)


def own_tokens(step: int, *caches: Tensor) -> list[Tensor]:
    """Caches [B, Hkv, Nq, r, T, ...] up to token ``step``, views."""
    return [x.narrow(4, 0, step + 1) for x in caches]


def attend_step(
    q, k_text, v_text, k_thought, v_thought, step: int | Tensor, rules: Rules, out: Tensor, lse: Tensor
) -> None:
    """Fill out [B, Hq, Nq, r, Dv] and lse [B, Hq, Nq, r]; tokens of the thoughts beyond ``step`` are never read."""
    if not out.numel():
        return
    step = int(step)
    k_own, v_own = own_tokens(step, k_thought, v_thought)
    length = k_text.shape[2]
    everywhere = rules.positions is None and q.shape[2] == length
    if everywhere and flash.expressible(q, v_text, flash_rules := needed(rules, length, step + 1)):
        flash.attend_step(q, k_text, v_text, k_own, v_own, flash_rules, out, lse)
        return
    if direct.serves(q, k_text, rules, step + 1):
        direct.attend_step(q, k_text, v_text, k_own, v_own, rules, out, lse)
        return
    rules = needed(rules, length, step + 1)
    if rules.positions is not None and flash.expressible_in_part(q, v_text, rules):
        flash.attend_step(q, k_text, v_text, k_own, v_own, rules, out, lse)
    else:
        blocked.attend(q, k_text, v_text, k_own, v_own, rules, step, out, lse)


def attend_step_backward(
    do, out, lse, q, k_text, v_text, k_thought, v_thought, step: int | Tensor, rules: Rules, grads
) -> None:
    """Fill ``grads``, which are shaped like q and the caches, up to token ``step``."""
    if not out.numel():
        return
    step = int(step)
    rules = needed(rules, k_text.shape[2], step + 1)
    dq, dk_text, dv_text, *d_thought = grads
    grads = (dq, dk_text, dv_text, *own_tokens(step, *d_thought))
    inputs = (q, k_text, v_text, *own_tokens(step, k_thought, v_thought))
    blocked.attend_backward(do, out, lse, *inputs, rules, step, grads)


def attend_part(q, k_text, v_text, k_thought, v_thought, rules: Rules, out: Tensor, lse: Tensor) -> None:
    """Fill out [B, Hq, Nq, r*T, Dv] and lse [B, Hq, Nq, r*T]."""
    if not out.numel():
        return
    rules = needed(rules, k_text.shape[2], k_thought.shape[4])
    if flash.expressible_in_part(q, v_text, rules):
        flash.attend_part(q, k_text, v_text, k_thought, v_thought, rules, out, lse)
    else:
        blocked.attend(q, k_text, v_text, k_thought, v_thought, rules, 0, out, lse)


def attend_part_backward(do, out, lse, q, k_text, v_text, k_thought, v_thought, rules: Rules, grads) -> None:
    """Fill ``grads``, which are shaped like q and the caches."""
    if not out.numel():
        for grad in grads:
            grad.zero_()
        return
    rules = needed(rules, k_text.shape[2], k_thought.shape[4])
    inputs = (q, k_text, v_text, k_thought, v_thought)
    if flash.expressible_in_part(q, v_text, rules):
        flash.attend_part_backward(do, out, lse, *inputs, rules, grads)
    else:
        blocked.attend_backward(do, out, lse, *inputs, rules, 0, grads)
