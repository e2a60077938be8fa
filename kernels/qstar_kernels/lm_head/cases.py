"""Launches of every kernel of the head on a shape of one's choice: what ``resources`` compiles and ``tune`` times."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qstar_kernels.launch import Launch
from qstar_kernels.lm_head import fused
from qstar_kernels.lm_head.logits import LogitMap
from qstar_kernels.lm_head.tiles import KERNELS, TABLE, WIDTHS

__all__ = ["KERNELS", "TABLE", "WIDTHS", "Shape", "build_launch"]


class Shape(NamedTuple):
    """``rows`` rows of ``width`` values, ``base_rows`` of them before a thought, and a Llama 3 vocabulary."""

    width: int
    rows: int = 4096
    base_rows: int = 1024
    vocabulary: int = 128_256


def build_launch(
    kernel: str, architecture: str, dtype: torch.dtype, shape: Shape, *, rules: bool = False, device: str = "meta"
) -> Launch:
    """A launch of one of ``KERNELS``; ``rules`` gives it all that is optional."""

    def states(*cells: int) -> Tensor:
        return torch.randn(*cells, shape.width, dtype=dtype, device=device)

    def values(of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape.rows, dtype=of, device=device)

    if kernel in ("mix", "mix_gradient", "base_gradient"):
        base, thought, head_weight = states(shape.base_rows), states(shape.rows), states()
        index = torch.arange(shape.rows, device=device) // (shape.rows // shape.base_rows)
        if kernel == "mix":
            mixed = torch.empty_like(thought)
            return fused.mix_launch(
                base, thought, states(shape.rows), head_weight, index, rules, mixed, values(), architecture
            )
        d_mixed = states(shape.rows)
        if kernel == "mix_gradient":
            given = (d_mixed, values() if rules else None, base, thought, head_weight, index, values(), rules)
            grads = torch.empty_like(thought), torch.empty_like(thought), values()
            return fused.mix_gradient_launch(*given, *grads, architecture)
        order, ends = torch.arange(shape.rows, device=device), torch.arange(1, shape.base_rows + 1, device=device)
        ends *= shape.rows // shape.base_rows
        return fused.base_gradient_launch(d_mixed, values(), order, ends, torch.empty_like(base), architecture)

    weight = states(shape.vocabulary)
    bias = torch.zeros(shape.vocabulary, dtype=dtype, device=device) if rules else None
    forbidden = torch.arange(1, device=device) if rules else None
    logit_map = LogitMap(0.7, 1.3, 30.0) if rules else LogitMap(1.0, 1.0, None)
    head = fused.TritonRows(weight, bias, forbidden, logit_map, architecture)
    y = torch.randn(shape.rows, shape.vocabulary, device=device)
    extra = values() if rules else None
    if kernel == "score":
        return head.score_launch(y, values(torch.int64), values(), extra)
    if kernel == "gradient":
        d_logits = y.view(dtype)[:, : shape.vocabulary]
        return head.gradient_launch(y, values(torch.int64), values(), extra, extra, values(), d_logits)
    draws = fused.TritonDraws(head, logit_map, 1.0, 2**40, 3)
    return draws.launches(y, 0, values(torch.int64), values())[kernel == "draw"]
