"""``attn_implementation="qstar"`` in ordinary models, without thoughts: their results stay what they were.

Causal attention of a whole text with a sliding window, a soft-cap or sinks goes to
:func:`qstar_kernels.thought_attention`, which makes neither a mask nor dense scores, where :func:`fused_is_better` says
so. Everything else (no such rule, padding, packed documents, a custom mask, decoding with a cache, dropout,
compilation) goes to torch's ``sdpa``, or to the model's own eager attention for a soft-cap or sinks, which ``sdpa``
lacks.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_tracing

from qstar.autocast import compute_dtype
from qstar.layouts import Packed, attend


class WindowMask(Tensor):
    """The mask of a sliding window over a whole text, ``[B, 1, N, N]`` boolean, made only if something reads it.

    It is a tensor for the models that slice, extend or combine their masks: they find what ``sdpa_mask`` gives.
    """

    @staticmethod
    def __new__(cls, window: int, arguments: dict[str, Any]) -> WindowMask:
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])

    def __init__(self, window: int, arguments: dict[str, Any]):
        self._window = window
        self._arguments = arguments
        self._dense: Tensor | None = None

    @property
    def window(self) -> int | None:
        """The window in positions; None once the mask has been read, since it may have been changed in place."""
        return self._window if self._dense is None else None

    def dense(self) -> Tensor:
        """The mask of ``sdpa`` for this window."""
        if self._dense is None:
            self._dense = cast(Tensor, sdpa_mask(local_size=self._window, **self._arguments))
        return self._dense

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares a static method, and calls a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def plain_mask(*, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of ``sdpa``, made only if something reads it where it is a window and nothing else."""
    if local_size is not None and _is_window_alone(local_size, **kwargs):
        return WindowMask(local_size, kwargs)
    return sdpa_mask(local_size=local_size, **kwargs)


def _is_window_alone(
    local_size: int,
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = False,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> bool:
    """Whether the mask is causal with a sliding window over a whole text, and nothing else: in doubt it is not.

    transformers allows the skip of a causal mask where nobody has added a mask function, documents or blocks.
    ``local_size`` may also be the size of a chunk, which only the config tells from a window.
    """
    if not allow_is_causal_skip or is_tracing(attention_mask):
        return False
    if local_size != getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return False
    if isinstance(q_offset, Tensor) or q_offset or kv_offset or not local_size < q_length == kv_length:
        return False
    return attention_mask is None or bool(attention_mask.all())


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float | None,
    sinks: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention without a layout: ours where that is faster, else ``sdpa`` or the model's own.

    Args:
        module: the attention layer that calls.
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        mask: what :func:`plain_mask` or the model made.
        softcap: soft-cap on the scores.
        sinks: attention sinks, ``[Hq]``.
        options: ``scaling``, ``dropout`` and whatever else the model passes.

    Returns:
        The output ``[B, S, Hq, Dv]``, and the weights where the attention that ran returns them.
    """
    text = _whole_text(module, query, key, value, mask, options)
    if text is not None and fused_is_better(query, text.window, softcap, sinks):
        return attend(text, module, query, key, value, options["scaling"], softcap, sinks), None
    if isinstance(mask, WindowMask):
        mask = mask.dense()
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if softcap is not None:
        options["softcap"] = softcap
    if sinks is not None:
        options["s_aux"] = sinks
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if mask is not None or _is_causal(module, options):
        mask = _additive(mask, query, key)
    return eager(module, query, key, value, mask, **options)


def fused_is_better(query: Tensor, window: int | None, softcap: float | None, sinks: Tensor | None) -> bool:
    """Whether a causal pass over a whole text should go to :func:`qstar_kernels.thought_attention`.

    Against it stand ``sdpa`` with an ``[N, N]`` mask for a window, and eager attention with ``[B, Hq, N, N]`` scores
    for a soft-cap or sinks. The lengths are those from which a forward and backward pass was measured to be faster on
    a CPU; a forward pass alone gains from there too, but for windows in 16 bits from 768. On a GPU, which was not
    measured, the argument is memory, and for windows also N * window operations instead of N * N.
    """
    positions, half = query.shape[2], compute_dtype(query).itemsize == 2
    if softcap is not None or sinks is not None:
        return positions >= (64 if half else 512)
    return window is not None and positions >= (512 if half else 1024)


def _whole_text(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Packed | None:
    """The layout of a causal pass over a whole text, with or without a window; None for every other pass."""
    if query.device.type not in ("cpu", "cuda") or is_tracing(query):
        return None
    if query.shape[::2] != key.shape[::2] or not compute_dtype(query) == compute_dtype(key) == compute_dtype(value):
        return None
    if any(options.get(name) for name in ("dropout", "output_attentions")):
        return None
    if any(options.get(name) is not None for name in ("position_bias", "cache")):
        return None
    if isinstance(mask, WindowMask) and mask.window is not None:
        return Packed(slots=1, window=mask.window)
    return Packed(slots=1) if mask is None and _is_causal(module, options) else None


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """A mask of ``sdpa`` (boolean, or None for causal) as eager attention adds it to the scores."""
    if mask is None:
        length, total = query.shape[2], key.shape[2]
        visible = torch.ones(length, total, dtype=torch.bool, device=query.device)
        mask = (visible.tril(total - length) if length > 1 else visible)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
