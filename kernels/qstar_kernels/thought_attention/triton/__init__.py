"""Thought attention by Triton kernels, for NVIDIA and AMD GPUs; the backwards of a step and of a part are torch's."""

from qstar_kernels.thought_attention.triton.attention import attend, attend_backward, attend_part, attend_step

__all__ = ["attend", "attend_backward", "attend_part", "attend_step"]
