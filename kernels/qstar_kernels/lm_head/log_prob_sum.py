"""A weighted sum of log-probabilities, with its gradient in the same pass over the logits.

    total = sum_r row_weight[r] log_prob[r]        d y = row_weight (onehot(target) - p)

Where the weights of the rows are known beforehand, as in a likelihood or once rewards are in, no logit is made twice:
three products a row instead of the four of ``linear_log_prob``, and one where the weight is 0. What is kept for the
backward are the gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels.backends import choose
from qstar_kernels.common.arguments import check_alike, check_tensor
from qstar_kernels.lm_head.heads import make_rows
from qstar_kernels.lm_head.log_prob import check_scored, differentiate, linear_log_prob, score_rows
from qstar_kernels.lm_head.logits import LogitMap, accumulator_dtype, check_targets, rows_of

FLOAT16_HEADROOM = 8  # bits by which a weight exceeds what gradients are multiples of


class _LinearLogProbSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, row_weight, idle, rows, forbidden, backend, *head_options):
        head = make_rows(backend, weight, bias, forbidden, *head_options)
        needs = ctx.needs_input_grad[:3]
        ctx.unit = gradient_unit(row_weight, rows, head_options[-1])
        log_prob = torch.zeros_like(row_weight, memory_format=torch.contiguous_format)
        if len(idle):
            score_rows(hidden, head, idle, targets, log_prob)
        upstream = row_weight / ctx.unit
        grads = differentiate(hidden, head, rows, targets, upstream, needs, hidden.dtype, log_prob=log_prob)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(log_prob)
        return (log_prob * row_weight).sum(), log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total, _):
        factor = d_total * ctx.unit
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if grad is None else scaled(grad, factor, dtype) for grad, dtype in saved), *(None,) * 8


def gradient_unit(row_weight: Tensor, rows: Tensor, product_dtype: torch.dtype) -> float | Tensor:
    """What the gradients are multiples of until the backward, a power of two; found without waiting for the device.

    A float16 one would be lost where a loss scale, which comes with the backward, comes too late.
    """
    if product_dtype != torch.float16 or not len(rows):
        return 1.0
    largest = row_weight[rows].abs().max()
    unit = largest / (largest.frexp().mantissa * 2.0**FLOAT16_HEADROOM)  # exact, as 2 to a power need not be on a GPU
    return torch.where(largest.isfinite(), unit, 1.0)


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` in ``dtype``, rounded once and without a copy in between."""
    return torch.mul(grad, factor, out=grad.new_empty(grad.shape, dtype=dtype))


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
    product_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum of ``row_weight * log_prob``, see :func:`qstar_kernels.linear_log_prob`, in one pass over the logits.

    Differentiable with respect to ``hidden``, ``weight`` and ``bias``, not ``row_weight``. The gradients are made in
    the forward, chunk by chunk, and kept for the backward, those of ``weight`` and ``bias`` in fp32.

    Args:
        hidden: ``[R, E]``, float64, float32, bfloat16 or float16.
        weight: ``[V, E]``, the dtype of ``hidden``, that of the products, or float32 beside 16-bit ``hidden``.
        targets: ``[R]`` int64 token ids, or ``ignore_index``.
        row_weight: ``[R]`` float32 (float64 for float64 inputs).
        bias, temperature, logit_scale, softcap, forbidden, ignore_index, product_dtype, backend: as for
            ``linear_log_prob``.

    Returns:
        ``total``, a scalar, and ``log_prob [R]``, which is not differentiable: nats, in the dtype of ``row_weight``.

    Raises:
        TypeError, ValueError: as ``linear_log_prob``.
    """
    product_dtype = check_scored(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, forbidden, ignore_index, product_dtype
    )
    check_tensor("row_weight", row_weight, "[R]", (hidden.shape[0],), (accumulator_dtype(hidden),))
    check_alike("row_weight", row_weight, "hidden", hidden, dtype=False)
    row_weight = row_weight.detach()
    chosen = choose("linear_log_prob_sum", backend, hidden=hidden)
    differentiates = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if chosen == "reference" or not differentiates:
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
            product_dtype=product_dtype,
            backend=chosen,
        )
        return (log_prob * row_weight).sum(), log_prob.detach()
    scored = targets != ignore_index
    masks = scored & (row_weight == 0), scored & (row_weight != 0)
    counts = check_targets(weight.shape[0], targets, forbidden, ignore_index, *masks)
    idle, rows = map(rows_of, masks, counts)
    options = (forbidden, chosen, LogitMap(temperature, logit_scale, softcap), product_dtype)
    return _LinearLogProbSum.apply(hidden, weight, bias, targets, row_weight, idle, rows, *options)
