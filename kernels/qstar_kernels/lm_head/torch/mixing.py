"""The mixing head's last layer and interpolation in plain PyTorch; the equations are in ``../mix.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.lm_head.logits import accumulator_dtype


def gather(base: Tensor, base_index: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (base if base_index is None else base[base_index]).to(dtype)


def sum_by_index(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """``out[index[i]] += rows[i]`` in an order that does not change from run to run."""
    out = rows.new_zeros(size, rows.shape[1])
    if rows.is_cuda:  # index_add_ is atomic there; index_put_ sorts
        return out.index_put_((index,), rows, accumulate=True)
    return out.index_add_(0, index, rows)


def mix(base, thought, features, head_weight, base_index, sigmoid) -> tuple[Tensor, Tensor]:
    dtype = accumulator_dtype(thought)
    w = features.to(dtype) @ head_weight.to(dtype)
    if sigmoid:
        w = w.sigmoid_()
    u = gather(base, base_index, dtype)
    mixed = (thought.to(dtype) - u).mul_(w[:, None]).add_(u)
    # u + 0 would lose the sign of a zero and let a thought's infinity through.
    return torch.where(w[:, None] == 0, u, mixed).to(thought.dtype), w


def mix_gradients(d_mixed, d_w, base, thought, features, head_weight, base_index, w, sigmoid, needs):
    """Gradients of base, thought and features where needed, and of ``features . head_weight``."""
    dtype = accumulator_dtype(thought)
    d_base = d_thought = d_features = None
    if d_mixed is not None:
        d_mixed = d_mixed.to(dtype)
        u = gather(base, base_index, dtype)
        row_dot = (thought.to(dtype) - u).mul_(d_mixed).sum(-1)
        d_w = row_dot if d_w is None else d_w + row_dot
        if needs[0]:
            d_u = (1.0 - w)[:, None] * d_mixed
            d_base = d_u if base_index is None else sum_by_index(d_u, base_index, len(base))
            d_base = d_base.to(base.dtype)
        if needs[1]:
            d_thought = (w[:, None] * d_mixed).to(thought.dtype)
    d_score = d_w * w * (1.0 - w) if sigmoid else d_w
    if needs[2]:
        d_features = (d_score[:, None] * head_weight.to(dtype)).to(features.dtype)
    return d_base, d_thought, d_features, d_score
