"""The head in plain PyTorch, on any device."""

from qstar_kernels.lm_head.torch.draws import Draws
from qstar_kernels.lm_head.torch.mixing import mix, mix_gradients
from qstar_kernels.lm_head.torch.rows import Rows

__all__ = ["Draws", "Rows", "mix", "mix_gradients"]
