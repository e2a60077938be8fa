"""Log-probabilities of tokens under a linear head, never holding all logits.

The backward makes each chunk's logits again; each backend's ``rows.py`` has what happens to them. Log-probability and
normaliser come from the same values, so that no log-probability exceeds 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels import products, reference
from qstar_kernels.backends import choose
from qstar_kernels.common.arguments import check_alike, check_integer, check_number, check_tensor
from qstar_kernels.common.autocast import without_autocast
from qstar_kernels.lm_head.heads import make_rows
from qstar_kernels.lm_head.logits import (
    LEAST_TEMPERATURE,
    LogitMap,
    accumulator_dtype,
    add_product,
    check_head,
    check_targets,
    logit_chunks,
    product,
    rows_of,
)


class HeadGradients(NamedTuple):
    """Those of hidden, weight and bias, the latter two in the accumulator's dtype; None where not needed."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def differentiate(
    hidden, head, rows, targets, d_log_prob, needs, dtype, *, d_entropy=None, entropy=None, log_prob=None
) -> HeadGradients:
    """The gradients that ``rows`` give, that of hidden in ``dtype``; fills log_prob ``[R]``, if any, at these rows."""
    wide = accumulator_dtype(hidden)
    d_hidden, d_weight, d_bias = grads = HeadGradients(
        hidden.new_zeros(hidden.shape, dtype=dtype) if needs[0] else None,
        hidden.new_zeros(head.weight.shape, dtype=wide) if needs[1] else None,
        hidden.new_zeros(len(head.weight), dtype=wide) if needs[2] else None,
    )
    with without_autocast(hidden):
        for chunk, factors, y in logit_chunks(hidden, head, rows):
            given = (None if x is None else x[chunk] for x in (d_log_prob, d_entropy, entropy))
            scores = None if log_prob is None else log_prob.new_empty(len(chunk))
            dtype_of_gradient = head.weight.dtype if d_bias is None else y.dtype
            d_logits = head.gradient(y, targets[chunk], *given, scores, dtype_of_gradient)
            if log_prob is not None:
                log_prob[chunk] = scores
            if d_bias is not None:  # a sum over rows of what has not been rounded yet
                d_bias += d_logits.sum(0)
                d_logits = d_logits.to(head.weight.dtype)
            if d_hidden is not None:
                d_hidden[chunk] = product(d_logits, head.weight, dtype)
            if d_weight is not None:
                add_product(d_weight, d_logits.T, factors[0])
    return grads


def score_rows(hidden, head, rows, targets, log_prob: Tensor, entropy: Tensor | None = None) -> None:
    """Fill log_prob ``[R]`` and entropy ``[R]``, if any, at ``rows``."""
    with without_autocast(hidden):
        for chunk, _, y in logit_chunks(hidden, head, rows):
            scores = head.score(y, targets[chunk], entropy is not None)
            log_prob[chunk] = scores[0]
            if entropy is not None:
                entropy[chunk] = scores[1]


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, rows, forbidden, ignore_index, want_entropy, backend, *head_options
    ):
        head = make_rows(backend, weight, bias, forbidden, *head_options)
        log_prob = hidden.new_zeros(len(hidden), dtype=accumulator_dtype(hidden))
        entropy = torch.zeros_like(log_prob) if want_entropy else None
        score_rows(hidden, head, rows, targets, log_prob, entropy)
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(hidden, weight, bias, targets, forbidden, entropy)
            ctx.ignore_index, ctx.backend, ctx.head_options = ignore_index, backend, head_options
            ctx.cpu_products = products.current_cpu_products()
        return (log_prob, entropy) if want_entropy else log_prob

    @staticmethod
    @once_differentiable
    def backward(ctx, d_log_prob, d_entropy=None):
        if d_log_prob is None and d_entropy is None:
            return (None,) * 11
        hidden, weight, bias, targets, forbidden, entropy = ctx.saved_tensors
        if d_log_prob is None:
            d_log_prob = torch.zeros_like(d_entropy)
        wanted = d_log_prob != 0 if d_entropy is None else (d_log_prob != 0) | (d_entropy != 0)
        rows = (wanted & (targets != ctx.ignore_index)).nonzero().squeeze(1)
        head = make_rows(ctx.backend, weight, bias, forbidden, *ctx.head_options)
        needs = ctx.needs_input_grad[:3]
        with products.cpu_products(ctx.cpu_products):
            grads = differentiate(
                hidden, head, rows, targets, d_log_prob, needs, hidden.dtype, d_entropy=d_entropy, entropy=entropy
            )
        inputs = zip(grads, (hidden, weight, bias), strict=True)
        return *(None if grad is None else grad.to(x.dtype) for grad, x in inputs), *(None,) * 8


def check_scored(
    hidden, weight, targets, bias, temperature, logit_scale, softcap, forbidden, ignore_index, product_dtype
) -> torch.dtype:
    """Check what a scored head is given, all but the ids; returns the dtype of the products."""
    product_dtype = check_head(hidden, weight, bias, forbidden, logit_scale, softcap, product_dtype)
    check_tensor("targets", targets, "[R]", (hidden.shape[0],), (torch.int64,))
    check_alike("targets", targets, "hidden", hidden, dtype=False)
    check_number("temperature", temperature, at_least=LEAST_TEMPERATURE)
    check_integer("ignore_index", ignore_index)
    return product_dtype


@overload
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    forbidden: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    product_dtype: torch.dtype | None = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    forbidden: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    product_dtype: torch.dtype | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    forbidden: Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: bool,
    product_dtype: torch.dtype | None = ...,
    backend: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    product_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each row's target under ``softmax(softcap(logit_scale (h W^T + bias)) / temperature)``.

    Differentiable with respect to ``hidden``, ``weight`` and ``bias``. Logits exist for one chunk of rows at a time, in
    the forward as in the backward; rows whose upstream gradient is 0 are left out of the backward's products, and the
    gradient of ``weight`` accumulates in fp32. 16-bit inputs are computed in fp32; autocast has no effect.

    Args:
        hidden: ``[R, E]``, float64, float32, bfloat16 or float16.
        weight: ``[V, E]``, the dtype of ``hidden``, that of the products, or float32 beside 16-bit ``hidden``.
        targets: ``[R]`` int64 token ids, or ``ignore_index``.
        bias: ``[V]``, a dtype that ``weight`` may have.
        temperature: divides the logits; at least 1e-6.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: above 0; bounds the logits by ``softcap tanh(x / softcap)``.
        forbidden: ``[F]`` int64 ids whose probability is 0, inside the normaliser.
        ignore_index: a target that marks a row to leave out: its results are 0, as are its gradients.
        return_entropy: return the entropy of every row's distribution as well.
        product_dtype: that of the factors in a GPU's products, by default that of ``hidden``. bfloat16 and float16 are
            for float32 ``hidden``: the logits then take two products, of what ``hidden`` rounds to and of what that
            loses, so that small differences between rows outlive the rounding. float16 holds no state beyond 65504.
            CPUs make them in float32 all the same.
        backend: ``"reference"`` (dense), ``"torch"``, ``"triton"`` (kernels between the matrix library's products;
            not float64) or ``"auto"``: ``"triton"`` on a GPU where its kernels can run, else ``"torch"``.

    Returns:
        ``log_prob [R]`` at most 0, in nats, float32 (float64 for float64 inputs); with ``return_entropy`` also
        ``entropy [R]`` at least 0, in nats, differentiable as well.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; a target is neither in
            ``[0, V)`` nor ``ignore_index``, or it is forbidden; a named backend cannot run on these tensors.
        RuntimeError: ``backend`` is "triton", which is installed but broken.
    """
    product_dtype = check_scored(
        hidden, weight, targets, bias, temperature, logit_scale, softcap, forbidden, ignore_index, product_dtype
    )
    scored = targets != ignore_index
    (count,) = check_targets(weight.shape[0], targets, forbidden, ignore_index, scored)
    chosen = choose("linear_log_prob", backend, hidden=hidden)
    if chosen == "reference":
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
    options = (forbidden, ignore_index, bool(return_entropy), chosen, logit_map, product_dtype)
    return _LinearLogProb.apply(hidden, weight, bias, targets, rows_of(scored, count), *options)
