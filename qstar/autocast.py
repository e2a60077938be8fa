"""The dtype that autocast computes in, for the tensors that it does not reach."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``x`` is computed in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in the dtype that each is computed in: rotary embeddings leave queries and keys in float32."""
    return tuple(x.to(compute_dtype(x)) for x in tensors)
