"""Operators for thought tokens, for any PyTorch project.

Thought attention (every thought token sees its own prefix of the text and its own earlier thought
tokens), the interpolation of the mixing head, and the language-model head (log-probabilities and
sampling) without ever holding all logits. Each of these takes ``backend="auto" | "reference" | "torch" | "triton"``;
:func:`explain` says what ``"auto"`` is on a device, and why. Float32 products on a CPU go to the faster of
PyTorch's own libraries, those of linear layers inside :func:`faster_linear`; :func:`cpu_products` turns it off.
"""

from qstar_kernels.backends import explain
from qstar_kernels.common.random_bits import row_uniforms
from qstar_kernels.lm_head import linear_log_prob, linear_log_prob_sum, mix_hidden, sample_linear
from qstar_kernels.products import CPU_LIBRARIES, cpu_products, current_cpu_products, faster_linear, linear
from qstar_kernels.thought_attention import thought_attention, thought_attention_part, thought_attention_step

__all__ = [
    "CPU_LIBRARIES",
    "cpu_products",
    "current_cpu_products",
    "explain",
    "faster_linear",
    "linear",
    "linear_log_prob",
    "linear_log_prob_sum",
    "mix_hidden",
    "row_uniforms",
    "sample_linear",
    "thought_attention",
    "thought_attention_part",
    "thought_attention_step",
]
