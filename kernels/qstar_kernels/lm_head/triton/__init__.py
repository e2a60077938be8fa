"""The head by Triton kernels, between products by the matrix library."""

from qstar_kernels.lm_head.triton.draws import Draws
from qstar_kernels.lm_head.triton.mixing import mix, mix_gradients
from qstar_kernels.lm_head.triton.rows import Rows

__all__ = ["Draws", "Rows", "mix", "mix_gradients"]
