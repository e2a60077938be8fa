"""Thought attention in plain PyTorch: any rule, any device, memory linear in N."""

from qstar_kernels.thought_attention.torch.attention import (
    attend,
    attend_backward,
    attend_part,
    attend_part_backward,
    attend_step,
    attend_step_backward,
)

__all__ = [
    "attend",
    "attend_backward",
    "attend_part",
    "attend_part_backward",
    "attend_step",
    "attend_step_backward",
]
