"""A head as a backend takes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, dtype

from qstar_kernels.backends import implementation
from qstar_kernels.lm_head import logits


def make_rows(
    backend: str,
    weight: Tensor,
    bias: Tensor | None,
    forbidden: Tensor | None,
    logit_map: logits.LogitMap,
    product_dtype: dtype,
) -> Any:
    """A head and what happens to the rows of its logits, by ``backend``, "torch" or "triton"."""
    return implementation("lm_head", backend).Rows(logits.as_operand(weight, product_dtype), bias, forbidden, logit_map)
