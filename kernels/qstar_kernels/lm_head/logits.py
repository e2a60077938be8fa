"""Logits of a language-model head, one chunk of rows at a time.

    y = softcap(logit_scale (h W^T + bias)) / temperature        softcap(x) = cap tanh(x / cap)

with the forbidden columns at -inf. ``E`` is the width, ``V`` the vocabulary, ``R`` the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qstar_kernels import products
from qstar_kernels.common.arguments import check_alike, check_number, check_tensor

CPU_CHUNK_ELEMENTS = 2**24  # 64 MB in fp32: at V = 50k still 340 rows, below which the products slow down
CPU_CHUNK_ROWS = 1024  # the products gain nothing from more, and a small vocabulary's logits stay in the cache
GPU_CHUNK_ELEMENTS = 2**29  # 2 GB in fp32: 4096 rows at V = 128k, enough to amortise adding to dW
GPU_ROW_MULTIPLE = 128  # whole tiles of a product
TILE = 128  # columns, of the first stage of a draw
LEAST_TEMPERATURE = 1e-6  # far below it, logits over the temperature overflow


class LogitMap(NamedTuple):
    """What happens to a logit between the product and the softmax."""

    temperature: float
    logit_scale: float
    softcap: float | None


def accumulator_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def as_operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor of products in ``dtype``; float32 on a CPU, whose libraries round the products of 16-bit factors."""
    return tensor.to(dtype) if tensor.is_cuda else tensor.to(accumulator_dtype(tensor))


def split(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """``hidden`` as a sum of factors in ``dtype``: what rounding a wider one to it loses is a second factor."""
    high = hidden.to(dtype)
    if dtype.itemsize >= hidden.dtype.itemsize:
        return (high,)
    return high, (hidden - high).to(dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """``out = beta out + alpha a b`` in place, accumulated in the dtype of ``out``."""
    if products.goes_to_onednn(a, b.T):
        added = products.multiply(a, b.T)
        if beta == 0:
            return torch.mul(added, alpha, out=out)
        return (out if beta == 1 else out.mul_(beta)).add_(added, alpha=alpha)
    if a.dtype == out.dtype:
        return out.addmm_(a, b, beta=beta, alpha=alpha)
    return torch.addmm(out, a, b, out.dtype, beta=beta, alpha=alpha, out=out)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` in ``dtype``, rounded once."""
    if products.goes_to_onednn(a, b.T):
        return products.multiply(a, b.T).to(dtype)
    return torch.mm(a, b, out_dtype=dtype) if dtype.itemsize > a.dtype.itemsize else (a @ b).to(dtype)


def logit_chunks(
    hidden: Tensor, head, rows: Tensor | None = None, *, column_multiple: int = 1
) -> Iterator[tuple[Any, tuple[Tensor, ...], Tensor]]:
    """Yield ``(rows, factors, y)`` by chunks of ``rows``, or of all as slices; every ``y`` lives in the same buffer.

    ``factors`` are those of :func:`split`, for products with the head's weight. ``head`` is of ``make_rows``, and
    says what ``y`` holds. It has V columns rounded up to ``column_multiple`` and that of the head,
    powers of two, and may be overwritten.
    """
    vocabulary = head.weight.shape[0]
    column_multiple = max(column_multiple, head.column_multiple)
    if hidden.is_cuda:
        height = max(1, GPU_CHUNK_ELEMENTS // max(vocabulary, hidden.shape[1]))
        height -= height % GPU_ROW_MULTIPLE if height > GPU_ROW_MULTIPLE else 0
    else:
        height = max(1, min(CPU_CHUNK_ROWS, CPU_CHUNK_ELEMENTS // vocabulary))
    width = -(-vocabulary // column_multiple) * column_multiple
    count = hidden.shape[0] if rows is None else rows.shape[0]
    buffer = hidden.new_empty(min(height, count), width, dtype=accumulator_dtype(hidden))
    for start in range(0, max(count, 1), height):
        here = slice(start, min(start + height, count))
        chunk = here if rows is None else rows[here]
        factors = split(hidden[chunk].contiguous(), head.weight.dtype)
        yield chunk, factors, head.multiply(factors, buffer[: here.stop - start])


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forbidden: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    product_dtype: torch.dtype | None,
) -> torch.dtype:
    """Check everything that can be checked without waiting for the device; returns the dtype of the products."""
    check_tensor("hidden", hidden, "[R, E]", (None, None))
    narrower = (torch.bfloat16, torch.float16) if hidden.dtype == torch.float32 else ()
    if product_dtype is None:
        product_dtype = hidden.dtype
    elif product_dtype not in (hidden.dtype, *narrower):
        wanted = " or ".join(map(str, (hidden.dtype, *narrower)))
        raise ValueError(f"product_dtype is {product_dtype!r}, but beside hidden of {hidden.dtype} it must be {wanted}")
    dtypes = tuple(dict.fromkeys((product_dtype, hidden.dtype, accumulator_dtype(hidden))))
    check_tensor("weight", weight, "[V, E]", (None, hidden.shape[1]), dtypes)
    check_alike("weight", weight, "hidden", hidden, dtype=False)
    if weight.shape[0] == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}, but it must be [V, E] with V at least 1")
    if bias is not None:
        check_tensor("bias", bias, "[V]", (weight.shape[0],), dtypes)
        check_alike("bias", bias, "hidden", hidden, dtype=False)
    if forbidden is not None:
        check_tensor("forbidden", forbidden, "[F]", (None,), (torch.int64,))
        check_alike("forbidden", forbidden, "hidden", hidden, dtype=False)
    check_number("logit_scale", logit_scale)
    if softcap is not None:
        check_number("softcap", softcap, above=0.0)
    return product_dtype


def is_outside(ids: Tensor, vocabulary: int) -> Tensor:
    return (ids < 0) | (ids >= vocabulary)


_accepted = WeakTensorKeyDictionary()  # what check_forbidden has let pass: a version of a tensor, and its vocabulary


def check_forbidden(vocabulary: int, forbidden: Tensor | None) -> None:
    """Check ids that are never drawn: the device is waited for when a tensor is new, and after it was written to.

    A tensor that comes again as it was, as for every token of a thought, is known by its version, which torch counts
    up with every write; what is written behind torch's back, through ``.data`` or NumPy, is not seen.
    """
    if forbidden is None:
        return
    accepted = None if forbidden.is_inference() else (forbidden._version, vocabulary)
    if accepted is not None and _accepted.get(forbidden) == accepted:
        return
    outside = is_outside(forbidden, vocabulary)
    if outside.any():
        raise ValueError(f"forbidden holds {forbidden[outside][0].item()}, but its ids must be in [0, {vocabulary})")
    if len(forbidden) >= vocabulary and len(forbidden.unique()) == vocabulary:
        raise ValueError(f"forbidden holds all {vocabulary} ids, but it must leave at least one token")
    if accepted is not None:
        _accepted[forbidden] = accepted


def check_targets(
    vocabulary: int, targets: Tensor, forbidden: Tensor | None, ignore_index: int, *counted: Tensor
) -> list[int]:
    """Check token ids, and count the rows of the masks ``counted``: the device is waited for once for all of it."""
    check_forbidden(vocabulary, forbidden)
    scored = targets != ignore_index
    faults = [(scored & is_outside(targets, vocabulary), f"in [0, {vocabulary}) or {ignore_index}")]
    if forbidden is not None:
        faults.append((scored & torch.isin(targets, forbidden), "none of the forbidden ids"))
    counts = torch.stack([mask.sum() for mask in (*counted, *(fault for fault, _ in faults))]).tolist()
    for (fault, wanted), found in zip(faults, counts[len(counted) :], strict=True):
        if found:
            raise ValueError(f"targets holds {targets[fault][0].item()}, but its ids must be {wanted}")
    return counts[: len(counted)]


def rows_of(mask: Tensor, count: int) -> Tensor:
    """The rows ``[count]`` where ``mask [R]`` is true, in order; no wait for the device, which has counted them."""
    return torch.nonzero_static(mask, size=count).squeeze(1)
