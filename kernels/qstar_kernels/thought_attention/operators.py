"""Thought attention as operators of torch: compilers, profilers and FLOP counters see one operation of each.

    torch.ops.qstar_kernels.thought_attention              .thought_attention_backward
    torch.ops.qstar_kernels.thought_attention_step         .thought_attention_step_backward
    torch.ops.qstar_kernels.thought_attention_part         .thought_attention_part_backward

Shapes are those of the public functions, which check the arguments; r and T of a part's queries are one axis, r*T.
``backend`` is "torch" or "triton".

``torch.library.custom_op`` is not used: to save that many arguments for a backward takes it 70 to 100 microseconds a
call, and its first call imports torch._dynamo.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels.backends import implementation
from qstar_kernels.common.autocast import without_autocast
from qstar_kernels.products import cpu_products, current_cpu_products
from qstar_kernels.thought_attention import flops
from qstar_kernels.thought_attention import torch as torch_backend
from qstar_kernels.thought_attention.rules import Rules

library = torch.library.Library("qstar_kernels", "FRAGMENT")
ops = torch.ops.qstar_kernels


def unit_stride(x: Tensor) -> Tensor:
    """x with neighbours in memory along its last axis, as products want it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def like_input(x: Tensor, width: int) -> Tensor:
    """An empty [B, H, N, C, width] laid out as x is: heads inside slots, or slots inside heads."""
    batch, heads, positions, slots, _ = x.shape
    outer = 3 if slots > 1 else 2  # the stride of a single slot says nothing
    if x.stride(1) < x.stride(outer):
        return x.new_empty(batch, positions, slots, heads, width).permute(0, 3, 1, 2, 4)
    return x.new_empty(batch, heads, positions, slots, width)


def empty_results(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return like_input(q, width), lse


def empty_gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(like_input(x, x.shape[-1]) for x in inputs)


def sinks_gradient(do: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """A sink's weight times the gradient of its score: it has no value, so that is minus delta.

    One head after the other, since products in ``lse``'s dtype may be larger than ``do`` itself.
    """
    if sinks is None:
        return None
    grads = []
    for head, sink in enumerate(sinks.to(lse.dtype)):
        weight = torch.exp(sink - lse[:, head]).masked_fill(lse[:, head] == -torch.inf, 0.0)  # nothing seen
        delta = (do[:, head].to(lse.dtype) * out[:, head]).sum(dim=-1)
        grads.append(-(weight * delta).sum())
    return torch.stack(grads).to(sinks.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    text_start: Tensor | None,
    rationales: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rules = Rules(scale, window, softcap, sinks, text_start)
    out, lse = empty_results(q, v.shape[-1])
    q, k, v = (unit_stride(x) for x in (q, k, v))
    with without_autocast(q):
        implementation("thought_attention", backend).attend(q, k, v, rationales, rules, out, lse)
    return out, lse


def attend_fake(q, k, v, *_):
    return empty_results(q, v.shape[-1])


def attend_backward(
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    text_start: Tensor | None,
    rationales: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; that of the sinks takes no kernel."""
    rules = Rules(scale, window, softcap, sinks, text_start)
    grads = empty_gradients(q, k, v)
    do, q, k, v = (unit_stride(x) for x in (do, q, k, v))
    with without_autocast(q):
        implementation("thought_attention", backend).attend_backward(do, out, lse, q, k, v, rationales, rules, *grads)
    return grads


def attend_backward_fake(do, out, lse, q, k, v, *_):
    return empty_gradients(q, k, v)


def attend_step(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    step: int | None,
    step_index: Tensor | None,
    sinks: Tensor | None,
    text_start: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``step_index`` [] stands for ``step`` where only the device knows it: one of them is None."""
    rules = Rules(scale, window, softcap, sinks, text_start, positions)
    inputs = (unit_stride(x) for x in (q, k_text, v_text, k_thought, v_thought))
    out, lse = empty_results(q, v_text.shape[-1])
    with without_autocast(q):
        at = step if step_index is None else step_index
        implementation("thought_attention", backend).attend_step(*inputs, at, rules, out, lse)
    return out, lse


def attend_step_backward(
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    step: int | None,
    step_index: Tensor | None,
    sinks: Tensor | None,
    text_start: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By the torch backend, whichever the forward's was; the gradients of tokens beyond ``step`` are 0."""
    rules = Rules(scale, window, softcap, sinks, text_start, positions)
    inputs = (q, k_text, v_text, k_thought, v_thought)
    grads = tuple(torch.zeros_like(x) for x in inputs)
    with without_autocast(q):
        at = step if step_index is None else step_index
        torch_backend.attend_step_backward(do, out, lse, *inputs, at, rules, grads)
    return grads


def attend_step_backward_fake(do, out, lse, *inputs):
    return tuple(torch.empty_like(x) for x in inputs[:5])


def attend_part(
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    sinks: Tensor | None,
    text_start: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rules = Rules(scale, window, softcap, sinks, text_start, positions)
    inputs = (unit_stride(x) for x in (q, k_text, v_text, k_thought, v_thought))
    out, lse = empty_results(q, v_text.shape[-1])
    with without_autocast(q):
        implementation("thought_attention", backend).attend_part(*inputs, rules, out, lse)
    return out, lse


def attend_part_backward(
    do: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    k_thought: Tensor,
    v_thought: Tensor,
    sinks: Tensor | None,
    text_start: Tensor | None,
    positions: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """By the torch backend, whichever the forward's was."""
    rules = Rules(scale, window, softcap, sinks, text_start, positions)
    inputs = (q, k_text, v_text, k_thought, v_thought)
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    with without_autocast(q):
        torch_backend.attend_part_backward(do, out, lse, *inputs, rules, grads)
    return grads


def attend_part_backward_fake(do, out, lse, *inputs):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:5])


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.thought_attention(*inputs)
        ctx.library = current_cpu_products()
        *tensors, ctx.rationales, ctx.scale, ctx.window, ctx.softcap, ctx.backend = inputs
        ctx.save_for_backward(out, lse, *tensors)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        out, lse, *inputs, sinks, text_start = ctx.saved_tensors
        rules = (sinks, text_start, ctx.rationales, ctx.scale, ctx.window, ctx.softcap, ctx.backend)
        with cpu_products(ctx.library):
            grads = ops.thought_attention_backward(do, out, lse, *inputs, *rules)
        return *grads, sinks_gradient(do, out, lse, sinks), *(None,) * 6


class StepAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.thought_attention_step(*inputs)
        ctx.library = current_cpu_products()
        *tensors, ctx.step, step_index, sinks, text_start, positions, ctx.scale, ctx.window, ctx.softcap, _ = inputs
        ctx.save_for_backward(out, lse, *tensors, step_index, sinks, text_start, positions)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        out, lse, *inputs, step_index, sinks, text_start, positions = ctx.saved_tensors
        rules = (ctx.step, step_index, sinks, text_start, positions, ctx.scale, ctx.window, ctx.softcap)
        with cpu_products(ctx.library):
            grads = ops.thought_attention_step_backward(do, out, lse, *inputs, *rules)
        return *grads, None, None, sinks_gradient(do, out, lse, sinks), *(None,) * 6


class PartAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.thought_attention_part(*inputs)
        ctx.library = current_cpu_products()
        *tensors, ctx.scale, ctx.window, ctx.softcap, _ = inputs
        ctx.save_for_backward(out, lse, *tensors)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        out, lse, *inputs, sinks, text_start, positions = ctx.saved_tensors
        rules = (sinks, text_start, positions, ctx.scale, ctx.window, ctx.softcap)
        with cpu_products(ctx.library):
            grads = ops.thought_attention_part_backward(do, out, lse, *inputs, *rules)
        return *grads, sinks_gradient(do, out, lse, sinks), *(None,) * 6


def differentiate(op: Callable, function: type[torch.autograd.Function], *inputs):
    """``op``, through ``function`` where a gradient may be asked for."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return function.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def define(name: str, implementation: Callable, fake: Callable, function: type[torch.autograd.Function] | None) -> None:
    schema = torch.library.infer_schema(implementation, mutates_args=(), op_name=name)
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qstar_kernels::{name}", fake, lib=library)
    if function is not None:
        library.impl(name, partial(differentiate, getattr(ops, name), function), "Autograd")


define("thought_attention", attend, attend_fake, Attention)
define("thought_attention_backward", attend_backward, attend_backward_fake, None)
define("thought_attention_step", attend_step, attend_fake, StepAttention)
define("thought_attention_step_backward", attend_step_backward, attend_step_backward_fake, None)
define("thought_attention_part", attend_part, attend_fake, PartAttention)
define("thought_attention_part_backward", attend_part_backward, attend_part_backward_fake, None)
try:
    from torch.utils.flop_counter import register_flop_formula
except Exception:  # it imports Triton: where that is broken there is no counter, and backends.py says why
    pass
else:
    for name, formula in (
        ("thought_attention", flops.attend),
        ("thought_attention_backward", flops.attend_backward),
        ("thought_attention_step", flops.attend_step),
        ("thought_attention_step_backward", flops.attend_step_backward),
        ("thought_attention_part", flops.attend_part),
        ("thought_attention_part_backward", flops.attend_part_backward),
    ):
        register_flop_formula(getattr(ops, name))(formula)
