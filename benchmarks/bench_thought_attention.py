"""Thought attention against the dense masked path: one attention call over the grid with a mask [N*C, N*C].

Useful FLOPs: 4*D for each query-key pair that counts, forward; 10*D more, backward. The mask is part of what the dense
path holds; its making is not timed, since a model makes it once for all layers.
"""

import pytest
import torch
from paired import compare
from torch.nn import functional as F

from qstar_kernels import thought_attention
from qstar_kernels.reference import thought_visibility
from qstar_kernels.testing import AttentionCase, attention_inputs, relative_error

POSITIONS = [128, 256, 512, 1024]
CASE = AttentionCase(batch=1, heads=8, kv_heads=4, rationales=1, tokens=12, width=64, value_width=64)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
def test_thought_attention(benchmark, positions, backward):
    case = CASE._replace(positions=positions)
    inputs = attention_inputs(case, torch.float32)
    visible = thought_visibility(positions, case.slots, case.rationales, None, None, inputs.q.device)[:, None]
    mask = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    del visible
    do = torch.randn(1, positions, case.slots, case.heads, case.width).permute(0, 3, 1, 2, 4)

    def results(out):
        return (out, *torch.autograd.grad(out, inputs.leaves, do)) if backward else (out,)

    def ours():
        return results(thought_attention(*inputs[:3], backend="torch"))

    def dense_mask():
        flat = (x.flatten(2, 3) for x in inputs[:3])
        return results(F.scaled_dot_product_attention(*flat, attn_mask=mask, enable_gqa=True).view(inputs.q.shape))

    with torch.set_grad_enabled(backward):
        for mine, dense in zip(ours(), dense_mask(), strict=True):
            assert relative_error(mine, dense) < 4e-6
        compare(benchmark, {"ours": ours, "dense_mask": dense_mask}, rounds=7 if positions <= 256 else 3)

    flops = (14 if backward else 4) * case.width * case.pairs
    info = benchmark.extra_info
    info["useful_gflop"] = round(flops / 1e9, 3)
    info["mask_mib"] = round(mask.numel() * mask.element_size() / 2**20, 1)
    for path in ("ours", "dense_mask"):
        info[f"useful_gflop_per_s_{path}"] = round(flops / info[f"median_ms_{path}"] / 1e6, 1)
