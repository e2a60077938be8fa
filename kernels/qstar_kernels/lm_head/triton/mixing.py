"""Mixing by the Triton kernels: a program takes a row of the thoughts, and in the backward one of the base as well."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, architecture_of, run_all
from qstar_kernels.lm_head.triton.mix_kernels import base_gradient_kernel, mix_gradient_kernel, mix_kernel
from qstar_kernels.lm_head.triton.tiles import find_tile


def mix_launch(
    base, thought, features, head_weight, base_index, sigmoid: bool, mixed: Tensor, w: Tensor, architecture: str
) -> Launch:
    rows, width = thought.shape
    arguments = {
        "base": base,
        "thought": thought,
        "features": features,
        "head_weight": head_weight,
        "base_index": base_index,
        "mixed": mixed,
        "w": w,
        "base_stride": base.stride(),
        "thought_stride": thought.stride(),
        "features_stride": features.stride(),
        "head_stride": (0, *head_weight.stride()),
        "width": width,
        "SIGMOID": sigmoid,
    }
    return Launch(mix_kernel, rows, arguments, find_tile("mix", architecture, thought.dtype, width))


def mix_gradient_launch(
    d_mixed, d_w, base, thought, head_weight, base_index, w, sigmoid: bool, d_thought, d_features, d_score, architecture
) -> Launch:
    rows, width = thought.shape
    arguments = {
        "d_mixed": d_mixed,
        "d_weight": d_w,
        "base": base,
        "thought": thought,
        "head_weight": head_weight,
        "base_index": base_index,
        "w": w,
        "d_thought": d_thought,
        "d_features": d_features,
        "d_score": d_score,
        "d_mixed_stride": None if d_mixed is None else d_mixed.stride(),
        "base_stride": base.stride(),
        "thought_stride": thought.stride(),
        "head_stride": (0, *head_weight.stride()),
        "width": width,
        "SIGMOID": sigmoid,
    }
    return Launch(mix_gradient_kernel, rows, arguments, find_tile("mix_gradient", architecture, thought.dtype, width))


def base_gradient_launch(d_mixed, w, order, ends, d_base: Tensor, architecture: str) -> Launch:
    rows, width = d_base.shape
    tile = find_tile("base_gradient", architecture, d_base.dtype, width)
    arguments = {
        "d_mixed": d_mixed,
        "w": w,
        "order": order,
        "ends": ends,
        "d_base": d_base,
        "d_mixed_stride": d_mixed.stride(),
        "width": width,
    }
    return Launch(base_gradient_kernel, rows * -(-width // tile.keys), arguments, tile)


def mix(base, thought, features, head_weight, base_index, sigmoid: bool) -> tuple[Tensor, Tensor]:
    mixed = thought.new_empty(thought.shape)
    w = thought.new_empty(len(thought), dtype=torch.float32)
    base_index = None if base_index is None else base_index.contiguous()
    architecture = architecture_of(thought.device)
    launch = mix_launch(base, thought, features, head_weight, base_index, sigmoid, mixed, w, architecture)
    run_all([launch], thought)
    return mixed, w


def mix_gradients(d_mixed, d_w, base, thought, features, head_weight, base_index, w, sigmoid: bool, needs):
    """Gradients of base, thought and features where needed, and of ``features . head_weight``."""
    through_mixed = d_mixed is not None
    d_base = base.new_empty(base.shape) if needs[0] and through_mixed else None
    d_thought = thought.new_empty(thought.shape) if needs[1] and through_mixed else None
    d_features = features.new_empty(features.shape) if needs[2] else None
    d_score = torch.empty_like(w)
    d_w = None if d_w is None else d_w.contiguous()
    base_index = None if base_index is None else base_index.contiguous()
    architecture = architecture_of(thought.device)
    results = (d_thought, d_features, d_score)
    launches = [
        mix_gradient_launch(d_mixed, d_w, base, thought, head_weight, base_index, w, sigmoid, *results, architecture)
    ]
    if d_base is not None:
        order = ends = None
        if base_index is not None:
            sorted_index, order = base_index.sort(stable=True)
            ends = torch.searchsorted(sorted_index, torch.arange(len(base), device=base.device), right=True)
        launches.append(base_gradient_launch(d_mixed, w, order, ends, d_base, architecture))
    run_all(launches, thought)
    return d_base, d_thought, d_features, d_score
