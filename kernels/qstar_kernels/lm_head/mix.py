"""The last layer of the mixing head and the interpolation it weighs.

    w = features . head_weight   (its sigmoid, if asked)      u = base[base_index]      mixed = u + w (thought - u)

    d_u = (1 - w) d_mixed      d_thought = w d_mixed      d_w = <d_mixed, thought - u>

Rows that share a base state, as the rationales of a position do, name it by its index.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qstar_kernels import reference
from qstar_kernels.backends import choose, implementation
from qstar_kernels.common.arguments import check_alike, check_tensor
from qstar_kernels.common.autocast import without_autocast


class _MixHidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, base, thought, features, head_weight, base_index, sigmoid, backend):
        tensors = (base, thought, features, head_weight, base_index)
        with without_autocast(thought):
            mixed, w = implementation("lm_head", backend).mix(*tensors, sigmoid)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, w)
        ctx.sigmoid, ctx.backend = sigmoid, backend
        return mixed, w

    @staticmethod
    @once_differentiable
    def backward(ctx, d_mixed, d_w):
        if d_mixed is None and d_w is None:
            return (None,) * 7
        saved = ctx.saved_tensors  # once: with checkpointing a second look would be an error
        features, head_weight = saved[2:4]
        arguments = (d_mixed, d_w, *saved, ctx.sigmoid, ctx.needs_input_grad[:3])
        d_head = None
        with without_autocast(features):
            *grads, d_score = implementation("lm_head", ctx.backend).mix_gradients(*arguments)
            if ctx.needs_input_grad[3]:
                d_head = (d_score @ features.to(d_score.dtype)).to(head_weight.dtype)
        return *grads, d_head, None, None, None


def mix_hidden(
    base: Tensor,
    thought: Tensor,
    features: Tensor,
    head_weight: Tensor,
    *,
    base_index: Tensor | None = None,
    sigmoid: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Interpolate between hidden states before and after a thought: ``u + w (thought - u)``.

    A linear head after it gives the same as mixing the logits. Where ``w`` is 0, ``mixed`` is ``u`` bit for bit.
    Differentiable with respect to ``base``, ``thought``, ``features`` and ``head_weight``, through both results; rows
    that share a base row add up their gradients in fp32 and in a fixed order. Autocast has no effect.

    Args:
        base: ``[Rb, E]`` hidden states that predict without a thought, float64, float32, bfloat16 or float16.
        thought: ``[R, E]`` hidden states after a thought, the dtype of ``base``.
        features: ``[R, E]`` last hidden layer of the mixing head; float64 only together with ``thought``.
        head_weight: ``[E]`` last layer of the mixing head; float64 only together with ``thought``.
        base_index: ``[R]`` int64, the row of ``base`` for each thought; None takes the rows in order, and ``Rb == R``.
        sigmoid: bound ``w`` to (0, 1).
        backend: ``"reference"``, ``"torch"``, ``"triton"`` (not float64) or ``"auto"``: ``"triton"`` on a GPU where its
            kernels can run, else ``"torch"``.

    Returns:
        ``mixed [R, E]`` in the dtype of ``thought`` and ``w [R]`` in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; a named backend cannot run
            on these tensors.
        RuntimeError: ``backend`` is "triton", which is installed but broken.
    """
    check_tensor("thought", thought, "[R, E]", (None, None))
    rows, width = thought.shape
    if base_index is None:
        check_tensor("base", base, "[R, E]", (rows, width))
    else:
        check_tensor("base", base, "[Rb, E]", (None, width))
    check_alike("base", base, "thought", thought)
    dtypes = (torch.float64,) if thought.dtype == torch.float64 else (torch.float32, torch.bfloat16, torch.float16)
    check_tensor("features", features, "[R, E]", (rows, width), dtypes)
    check_tensor("head_weight", head_weight, "[E]", (width,), dtypes)
    for name, value in (("features", features), ("head_weight", head_weight)):
        check_alike(name, value, "thought", thought, dtype=False)
    if base_index is not None:
        check_tensor("base_index", base_index, "[R]", (rows,), (torch.int64,))
        check_alike("base_index", base_index, "thought", thought, dtype=False)
        outside = (base_index < 0) | (base_index >= len(base))
        if outside.any():
            found = base_index[outside][0].item()
            raise ValueError(f"base_index holds {found}, but its rows must be in [0, {len(base)})")

    chosen = choose("mix_hidden", backend, thought=thought)
    if chosen == "reference":
        with without_autocast(thought):
            return reference.mix_hidden(base, thought, features, head_weight, base_index=base_index, sigmoid=sigmoid)
    return _MixHidden.apply(base, thought, features, head_weight, base_index, bool(sigmoid), chosen)
