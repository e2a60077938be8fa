"""A weighted sum of log-probabilities, with its gradient in the same pass over the logits.

    total = sum_r row_weight[r] log_prob[r]        d y = row_weight (onehot(target) - p)

Where the weights of the rows are known beforehand, as in a likelihood or once rewards are in, no logit is made twice:
three products a row instead of the four of ``linear_log_prob``. What is kept for the backward are the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels.arguments import check_alike, check_tensor, choose_backend
from qstar_kernels.lm_head.log_prob import check_rows, linear_log_prob
from qstar_kernels.lm_head.logits import (
    LogitMap,
    accumulator_dtype,
    add_product,
    as_operand,
    logit_chunks,
    without_autocast,
)


class _LinearLogProbSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weight, forbidden, ignore_index, logit_map):
        dtype = accumulator_dtype(hidden)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        log_prob = hidden.new_zeros(len(hidden), dtype=dtype)
        d_hidden = torch.zeros_like(hidden, dtype=dtype) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
        temperature, logit_scale, softcap = logit_map
        rows = (targets != ignore_index).nonzero().squeeze(1)
        with without_autocast(hidden):
            factor = as_operand(weight)
            for chunk, h, y in logit_chunks(hidden, factor, bias, forbidden, rows, logit_map):
                slope = None
                if softcap is not None and any(ctx.needs_input_grad):
                    slope = (y * (temperature / softcap)).square_().neg_().add_(1.0)
                column = targets[chunk, None]
                log_p = torch.log_softmax(y, -1, out=y)
                log_prob[chunk] = log_p.gather(1, column).squeeze(1)
                if not any(ctx.needs_input_grad):
                    continue
                p = log_p.exp_()
                d_logits = p.scatter_(1, column, p.gather(1, column) - 1.0)
                d_logits.mul_((row_weight[chunk] * (-logit_scale / temperature))[:, None])
                if slope is not None:
                    d_logits.mul_(slope)
                    if forbidden is not None:
                        d_logits.index_fill_(1, forbidden, 0.0)
                if needs_bias:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(factor.dtype)
                if needs_hidden:
                    d_hidden[chunk] = (d_logits @ factor).to(dtype)
                if needs_weight:
                    add_product(d_weight, d_logits.T, h)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(log_prob)
        return (log_prob * row_weight).sum(), log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        grads = (None if grad is None else (grad * d_total).to(ctx.dtype) for grad in ctx.saved_tensors)
        return *grads, *(None,) * 5


def linear_log_prob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of ``row_weight * log_prob``, see :func:`qstar_kernels.linear_log_prob`, in one pass over the logits.

    Differentiable with respect to ``hidden``, ``weight`` and ``bias``, not ``row_weight``. The gradients are made in
    the forward, chunk by chunk, and kept for the backward, that of ``weight`` in fp32.

    Args:
        hidden: ``[R, E]``, float64, float32, bfloat16 or float16.
        weight: ``[V, E]``, the dtype of ``hidden``.
        targets: ``[R]`` int64 token ids, or ``ignore_index``.
        row_weight: ``[R]`` float32 (float64 for float64 inputs).
        bias, temperature, logit_scale, softcap, forbidden, ignore_index, backend: as for ``linear_log_prob``.

    Returns:
        ``total``, a scalar, and ``log_prob [R]``, which is not differentiable: nats, in the dtype of ``row_weight``.

    Raises:
        TypeError, ValueError: as ``linear_log_prob``.
    """
    check_rows(hidden, weight, targets, bias, temperature, logit_scale, softcap, forbidden, ignore_index)
    check_tensor("row_weight", row_weight, "[R]", (hidden.shape[0],), (accumulator_dtype(hidden),))
    check_alike("row_weight", row_weight, "hidden", hidden, dtype=False)
    row_weight = row_weight.detach()
    if choose_backend(backend) == "reference" or not torch.is_grad_enabled():
        log_prob = linear_log_prob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            forbidden=forbidden,
            ignore_index=ignore_index,
            backend=backend,
        )
        return (log_prob * row_weight).sum(), log_prob.detach()
    logit_map = LogitMap(temperature, logit_scale, softcap)
    return _LinearLogProbSum.apply(hidden, weight, bias, targets, row_weight, forbidden, ignore_index, logit_map)
