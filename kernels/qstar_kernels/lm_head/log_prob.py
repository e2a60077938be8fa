"""Log-probabilities of tokens under a linear head, never holding all logits.

    y = softcap(logit_scale (h W^T + bias)) / temperature, forbidden columns at -inf
    log_prob = y[target] - logsumexp(y)           p = softmax(y)           entropy = - sum_v p log p

    d y = d_log_prob (onehot(target) - p) - d_entropy p (log p + entropy)

The backward makes each chunk's y again. Log-probability and normaliser come from the same y, so none exceeds 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels import reference
from qstar_kernels.arguments import check_alike, check_integer, check_number, check_tensor, choose_backend
from qstar_kernels.lm_head.logits import (
    LogitMap,
    accumulator_dtype,
    add_product,
    as_operand,
    check_head,
    check_ids,
    logit_chunks,
    without_autocast,
)


def _score(y: Tensor, targets: Tensor, forbidden: Tensor | None, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """log_prob and entropy of a chunk; overwrites ``y``."""
    log_p = torch.log_softmax(y, -1, out=y)
    log_prob = log_p.gather(1, targets[:, None]).squeeze(1)
    if not want_entropy:
        return log_prob, None
    information = log_p.exp().mul_(log_p)
    if forbidden is not None:
        information.index_fill_(1, forbidden, 0.0)
    return log_prob, information.sum(-1).neg_()


def _d_logits(
    y: Tensor,
    targets: Tensor,
    forbidden: Tensor | None,
    d_log_prob: Tensor,
    d_entropy: Tensor | None,
    entropy: Tensor | None,
    cap: float | None,
) -> Tensor:
    """Gradient of a chunk's logits before the soft-cap; ``cap`` bounds |y|. Overwrites ``y``."""
    slope = None if cap is None else (y / cap).square_().neg_().add_(1.0)
    column = targets[:, None]
    if d_entropy is None:
        p = torch.softmax(y, -1, out=y)
        d_y = p.scatter_(1, column, p.gather(1, column) - 1.0).mul_(-d_log_prob[:, None])
    else:
        log_p = torch.log_softmax(y, -1, out=y)
        p = log_p.exp()
        d_y = log_p.add_(entropy[:, None]).mul_(p).mul_(-d_entropy[:, None])
        p.scatter_(1, column, p.gather(1, column) - 1.0)
        d_y.addcmul_(p, d_log_prob[:, None], value=-1.0)
    if slope is not None:
        d_y.mul_(slope)
    return d_y if forbidden is None else d_y.index_fill_(1, forbidden, 0.0)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, forbidden, ignore_index, logit_map, want_entropy):
        dtype = accumulator_dtype(hidden)
        log_prob = hidden.new_zeros(len(hidden), dtype=dtype)
        entropy = torch.zeros_like(log_prob) if want_entropy else None
        rows = (targets != ignore_index).nonzero().squeeze(1)
        with without_autocast(hidden):
            for chunk, _, y in logit_chunks(hidden, as_operand(weight), bias, forbidden, rows, logit_map):
                scores = _score(y, targets[chunk], forbidden, want_entropy)
                log_prob[chunk] = scores[0]
                if want_entropy:
                    entropy[chunk] = scores[1]
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(hidden, weight, bias, targets, forbidden, entropy)
            ctx.ignore_index, ctx.logit_map = ignore_index, logit_map
        return (log_prob, entropy) if want_entropy else log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_prob, d_entropy=None):
        if d_log_prob is None and d_entropy is None:
            return (None,) * 8
        hidden, weight, bias, targets, forbidden, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = accumulator_dtype(hidden)
        temperature, logit_scale, softcap = ctx.logit_map
        cap = None if softcap is None else softcap / temperature
        if d_log_prob is None:
            d_log_prob = torch.zeros_like(d_entropy)
        wanted = d_log_prob != 0 if d_entropy is None else (d_log_prob != 0) | (d_entropy != 0)
        rows = (wanted & (targets != ctx.ignore_index)).nonzero().squeeze(1)

        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if needs_bias else None
        with without_autocast(hidden):
            factor = as_operand(weight)
            for chunk, h, y in logit_chunks(hidden, factor, bias, forbidden, rows, ctx.logit_map):
                gain = logit_scale / temperature
                upstream = (d_log_prob[chunk] * gain, None if d_entropy is None else d_entropy[chunk] * gain)
                row_entropy = None if entropy is None else entropy[chunk]
                d_logits = _d_logits(y, targets[chunk], forbidden, *upstream, row_entropy, cap)
                if needs_bias:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(factor.dtype)
                if needs_hidden:
                    d_hidden[chunk] = (d_logits @ factor).to(hidden.dtype)
                if needs_weight:
                    add_product(d_weight, d_logits.T, h)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if needs_weight else None,
            d_bias.to(bias.dtype) if needs_bias else None,
            *(None,) * 5,
        )


def check_rows(hidden, weight, targets, bias, temperature, logit_scale, softcap, forbidden, ignore_index) -> None:
    """Check the arguments of a scored head."""
    check_head(hidden, weight, bias, forbidden, logit_scale, softcap)
    check_tensor("targets", targets, "[R]", (hidden.shape[0],), (torch.int64,))
    check_alike("targets", targets, "hidden", hidden, dtype=False)
    check_number("temperature", temperature, above=0.0)
    check_integer("ignore_index", ignore_index)
    check_ids(weight.shape[0], forbidden, targets, ignore_index)


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target under ``softmax(softcap(logit_scale (h W^T + bias)) / temperature)``.

    Differentiable with respect to ``hidden``, ``weight`` and ``bias``. Logits exist for one chunk of rows at a time, in
    the forward as in the backward; rows whose upstream gradient is 0 are left out of the backward's products, and the
    gradient of ``weight`` accumulates in fp32. 16-bit inputs are computed in fp32; autocast has no effect.

    Args:
        hidden: ``[R, E]``, float64, float32, bfloat16 or float16.
        weight: ``[V, E]``, the dtype of ``hidden``.
        targets: ``[R]`` int64 token ids, or ``ignore_index``.
        bias: ``[V]``, the dtype of ``hidden``.
        temperature: divides the logits; above 0.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: above 0; bounds the logits by ``softcap tanh(x / softcap)``.
        forbidden: ``[F]`` int64 ids whose probability is 0, inside the normaliser.
        ignore_index: a target that marks a row to leave out: its results are 0, as are its gradients.
        return_entropy: return the entropy of every row's distribution as well.
        backend: ``"auto"``, ``"torch"`` or ``"reference"`` (dense).

    Returns:
        ``log_prob [R]`` at most 0, in nats, float32 (float64 for float64 inputs); with ``return_entropy`` also
        ``entropy [R]`` at least 0, in nats, differentiable as well.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; a target is neither in
            ``[0, V)`` nor ``ignore_index``, or it is forbidden.
    """
    backend = choose_backend(backend)
    check_rows(hidden, weight, targets, bias, temperature, logit_scale, softcap, forbidden, ignore_index)

    if backend == "reference":
        with without_autocast(hidden):
            return reference.linear_log_prob(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                forbidden=forbidden,
                ignore_index=ignore_index,
                return_entropy=return_entropy,
            )
    logit_map = LogitMap(temperature, logit_scale, softcap)
    return _LinearLogProb.apply(hidden, weight, bias, targets, forbidden, ignore_index, logit_map, bool(return_entropy))
