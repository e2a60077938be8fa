"""Thought attention by Triton kernels, for NVIDIA and AMD GPUs; a step's backward is torch's."""

from qstar_kernels.thought_attention.triton.attention import attend, attend_backward, attend_step

__all__ = ["attend", "attend_backward", "attend_step"]
