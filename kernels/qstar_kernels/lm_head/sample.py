"""Samples from a linear head, with their log-probabilities, never holding all logits.

An exact draw in two stages, with two uniforms a row instead of one random number per token:

    p = softmax(softcap(logit_scale (h W^T + bias)) / temperature), forbidden columns at 0
    tile   = the first of the fixed tiles of 128 columns with   sum of p up to and with it  >  u1 sum(p)
    token  = the first of the tile's columns with               sum of p up to and with it  >  u2 sum(p in the tile)

The masses of tiles, and of the columns of one, add up in float64 or in whole quanta, so that tokens far below the top
keep their share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels import reference
from qstar_kernels.backends import choose, implementation
from qstar_kernels.common.arguments import check_alike, check_integer, check_number, check_tensor, integer_or_tensor
from qstar_kernels.common.autocast import without_autocast
from qstar_kernels.lm_head.heads import make_rows
from qstar_kernels.lm_head.logits import (
    LEAST_TEMPERATURE,
    TILE,
    LogitMap,
    check_forbidden,
    check_head,
    logit_chunks,
)


def _sample(hidden, weight, bias, forbidden, logit_map, product_dtype, temperature, seed, step, rows, backend):
    head = make_rows(backend, weight, bias, forbidden, logit_map, product_dtype)
    draws = implementation("lm_head", backend).Draws(head, logit_map, temperature, seed, step)
    drawn = [draws.draw(y, rows[chunk]) for chunk, _, y in logit_chunks(hidden, head, column_multiple=TILE)]
    tokens, log_prob = zip(*drawn, strict=True)
    return torch.cat(tokens), torch.cat(log_prob)


@torch.no_grad()
def sample_linear(
    hidden: Tensor,
    weight: Tensor,
    *,
    seed: int | Tensor,
    step: int | Tensor = 0,
    row_offset: int = 0,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    log_prob_temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    forbidden: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row from ``softmax(softcap(logit_scale (h W^T + bias)) / temperature)``.

    The draw of a row is a function of its logits and of (``seed``, ``step``, the row's number), the number being
    ``row_offset`` + row or what ``rows`` says: neither chunks nor the other rows matter, and processes that share the
    rows, each with its ``row_offset``, draw what one would. Matrix libraries may round a row's logits differently when
    it is multiplied among more or fewer rows; a draw changes only if its uniform falls within that rounding of a
    boundary (about 1e-6 of the draws in fp32). Not differentiable.

    Args:
        hidden: ``[R, E]``, float64, float32, bfloat16 or float16.
        weight: ``[V, E]``, the dtype of ``hidden``, that of the products, or float32 beside 16-bit ``hidden``.
        seed: any integer of 64 bits, signed or not; or an int64 or int32 tensor without dimensions, the same draws as
            those of its value. On the device of ``hidden`` it is read there, and the host need not wait for it.
        step: at least 0, below 2^64: draws of different steps are independent. Or a tensor as for ``seed``; on the
            device of ``hidden`` its value is not checked, and its 64 bits count without a sign.
        row_offset: at least 0: the number of the first row among all rows that share ``seed`` and ``step``.
        rows: ``[R]`` int64, the number of each row in place of ``row_offset`` + row: any 64 bits, for example those of
            a text and a position in it. Rows with one number have the same uniforms.
        bias: ``[V]``, a dtype that ``weight`` may have.
        temperature: at least 1e-6, or 0, which takes the arg-max, the lowest id among equals.
        log_prob_temperature: at least 1e-6; the temperature of the returned log-probability.
        logit_scale: multiplies the logits before the soft-cap.
        softcap: above 0; bounds the logits by ``softcap tanh(x / softcap)``.
        forbidden: ``[F]`` int64 ids that are never drawn and do not count in the log-probability's normaliser.
        product_dtype: as for :func:`qstar_kernels.linear_log_prob`.
        backend: ``"reference"`` (dense), ``"torch"``, ``"triton"`` (kernels after the matrix library's product; not
            float64) or ``"auto"``: ``"triton"`` on a GPU where its kernels can run, else ``"torch"``.

    Returns:
        ``tokens [R]`` int64 and ``log_prob [R]``, ``log softmax(z / log_prob_temperature)[token]`` in nats, at most 0,
        float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; a named backend cannot run
            on these tensors.
        RuntimeError: ``backend`` is "triton", which is installed but broken.
    """
    product_dtype = check_head(hidden, weight, bias, forbidden, logit_scale, softcap, product_dtype)
    seed = integer_or_tensor("seed", seed, hidden.device)
    step = integer_or_tensor("step", step, hidden.device, at_least=0)
    check_integer("row_offset", row_offset, at_least=0)
    for name, value, low, high in (
        ("seed", seed, -(2**63), 2**64),
        ("step", step, 0, 2**64),
        ("row_offset", row_offset, 0, 2**63 - len(hidden)),
    ):
        if not isinstance(value, Tensor) and not low <= value < high:
            raise ValueError(f"{name} is {value}, but it must be in [{low}, {high})")
    if rows is not None:
        check_tensor("rows", rows, "[R]", (len(hidden),), (torch.int64,))
        check_alike("rows", rows, "hidden", hidden, dtype=False)
        if row_offset:
            raise ValueError(f"row_offset is {row_offset}, but beside rows, which number every row, it must be 0")
    check_number("temperature", temperature, at_least=0.0)
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}, but it must be 0 or at least {LEAST_TEMPERATURE}")
    check_number("log_prob_temperature", log_prob_temperature, at_least=LEAST_TEMPERATURE)
    check_forbidden(weight.shape[0], forbidden)
    chosen = choose("sample_linear", backend, hidden=hidden)

    with without_autocast(hidden):
        if chosen == "reference":
            return reference.sample_linear(
                hidden,
                weight,
                seed=seed,
                step=step,
                row_offset=row_offset,
                rows=rows,
                bias=bias,
                temperature=temperature,
                log_prob_temperature=log_prob_temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                forbidden=forbidden,
            )
        numbers = range(row_offset, row_offset + hidden.shape[0]) if rows is None else rows.contiguous()
        logit_map = LogitMap(log_prob_temperature, logit_scale, softcap)
        return _sample(
            hidden, weight, bias, forbidden, logit_map, product_dtype, temperature, seed, step, numbers, chosen
        )
