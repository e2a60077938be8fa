"""Thought attention inside transformers: an attention function and a mask function, both named ``qstar``.

While a :func:`layout` is open, the mask function hands that layout to every layer in the place of a mask, and the
attention function reads from it which keys each query may see. transformers carries it as an opaque object, so it
survives gradient checkpointing and needs no code of any model.

Without a layout the pair is a drop-in for ``sdpa``. Causal attention of a whole text with a sliding window, a soft-cap
or sinks goes to :func:`qstar_kernels.thought_attention`, which makes neither a mask nor dense scores, where
:func:`fused_is_better` says so. Everything else (no such rule, padding, packed documents, a custom mask, decoding with
a cache, dropout, compilation) goes to torch's ``sdpa``, or to the model's own eager attention for a soft-cap or sinks,
which ``sdpa`` lacks.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_tracing

from qstar_kernels import thought_attention, thought_attention_step

NAME = "qstar"
AT_HAND = ("cpu",)  # devices whose values the host reads at once; a CPU writes a slice in a fifth of an index's time


@dataclass(frozen=True)
class Packed:
    """All tokens of a thought grid at once, ``[B, N*C]``; ``slots`` = 1 is plain text.

    Attributes:
        slots: C, the slots at one position.
        rationales: r.
        start: first text position that each position may see, ``[B, N]`` int64, or None.
        window: the layer's sliding window in positions, set by the mask function.
        backend: passed on to :func:`qstar_kernels.thought_attention`.
    """

    slots: int
    rationales: int = 1
    start: Tensor | None = None
    window: int | None = None
    backend: str = "auto"

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        q, k, v = (rearrange(x, "b h (n c) d -> b h n c d", c=self.slots) for x in (query, key, value))
        out = thought_attention(
            q,
            k,
            v,
            rationales=self.rationales,
            window=self.window,
            text_start=self.start,
            backend=self.backend,
            **options,
        )
        return rearrange(out, "b h n c d -> b (n c) h d")


@dataclass(frozen=True)
class Step:
    """One token of every rationale at the last positions of a text whose keys lie in ``cache``, ``[B, Nq*r]``."""

    cache: ThoughtCache
    step: int | Tensor
    start: Tensor | None = None
    window: int | None = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        layer = self.cache.layers[module.layer_idx]
        out = thought_attention_step(
            rearrange(query, "b h (n r) d -> b h n r d", r=self.cache.rationales),
            layer.keys,
            layer.values,
            layer.thought_keys,
            layer.thought_values,
            self.step,
            window=self.window,
            text_start=self.start,
            **options,
        )
        return rearrange(out, "b h n r d -> b (n r) h d")


Layout = Packed | Step


class ThoughtCache(Cache):
    """Keys and values of a text, and of the thoughts at its last positions.

    The first pass through the model fills the text, ``[B, Hkv, N, D]`` a layer. After :meth:`begin_step` a pass holds
    token ``t`` of every rationale and fills ``[B, Hkv, Nq, r, T, D]`` at ``t``; no key is copied twice.
    """

    def __init__(self, rationales: int, rationale_length: int):
        super().__init__(layer_class_to_replicate=lambda: _ThoughtCacheLayer(self))
        self.rationales = rationales
        self.rationale_length = rationale_length
        self.step: Tensor | None = None

    def begin_step(self, step: int | Tensor) -> None:
        """Let the next pass fill token ``step`` of every rationale; the value of a tensor ``[]`` is not checked."""
        if not isinstance(step, Tensor):
            if not 0 <= step < self.rationale_length:
                raise ValueError(f"step is {step}, but it must be in 0..{self.rationale_length - 1}")
            step = torch.full((), step, device=self.layers[0].keys.device)
        self.step = step


class _ThoughtCacheLayer(DynamicLayer):
    def __init__(self, cache: ThoughtCache):
        super().__init__()
        self.cache = cache
        self.thought_keys: Tensor | None = None
        self.thought_values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        key_states, value_states = _as_autocast(key_states, value_states)
        if self.cache.step is None:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
            return key_states, value_states
        keys, values = (
            rearrange(x, "b h (n r) d -> b h n r d", r=self.cache.rationales) for x in (key_states, value_states)
        )
        if self.thought_keys is None:
            self.thought_keys, self.thought_values = (
                x.new_empty(*x.shape[:4], self.cache.rationale_length, x.shape[4]) for x in (keys, values)
            )
        step = self.cache.step.to(keys.device)  # layers may lie on several devices
        write_token(self.thought_keys, step, keys)
        write_token(self.thought_values, step, values)
        return key_states, value_states


def write_token(cache: Tensor, step: Tensor, token: Tensor) -> None:
    """Write ``token`` ``[..., D]`` into ``cache`` ``[..., T, D]`` at ``step`` ``[]``, which no GPU is asked for."""
    if step.device.type in AT_HAND:
        cache.select(-2, int(step)).copy_(token)
    else:
        cache.index_copy_(-2, step[None], token.unsqueeze(-2))


@dataclass
class _Open:
    layout: Layout | None = None


# A module-level slot and not a ContextVar: the backward's recomputation and its threads must see the same one.
_open = _Open()


@contextlib.contextmanager
def layout(value: Layout) -> Iterator[None]:
    """Make every ``qstar`` attention inside see the tokens of its input as ``value`` lays them out."""
    previous, _open.layout = _open.layout, value
    try:
        yield
    finally:
        _open.layout = previous


class WindowMask(Tensor):
    """The mask of a sliding window over a whole text, ``[B, 1, N, N]`` boolean, made only if something reads it.

    It is a tensor for the models that slice, extend or combine their masks: they find what ``sdpa_mask`` gives.
    """

    @staticmethod
    def __new__(cls, window: int, arguments: dict) -> WindowMask:
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=arguments["device"])

    def __init__(self, window: int, arguments: dict):
        self._window = window
        self._arguments = arguments
        self._dense: Tensor | None = None

    @property
    def window(self) -> int | None:
        """The window in positions; None once the mask has been read, since it may have been changed in place."""
        return self._window if self._dense is None else None

    def dense(self) -> Tensor:
        if self._dense is None:
            self._dense = sdpa_mask(local_size=self._window, **self._arguments)
        return self._dense

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def qstar_mask(*, local_size: int | None = None, **kwargs) -> Layout | Tensor | None:
    """The mask function: the open layout with this layer's window; without one, the mask of ``sdpa``."""
    if _open.layout is not None:
        return replace(_open.layout, window=local_size)
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
    **kwargs,
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


def qstar_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """The attention function.

    Args:
        module: the attention layer that calls.
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, S, D]``.
        value: ``[B, Hkv, S, Dv]``.
        attention_mask: a layout, or a mask where none is open.
        scaling: factor on the scores, ``D**-0.5`` by default.
        dropout: must be 0 on a thought grid.
        softcap: soft-cap on the scores.
        s_aux: attention sinks, ``[Hq]``.

    Returns:
        The output ``[B, S, Hq, Dv]``, and None for the weights.

    Raises:
        ValueError: attention dropout or a position bias on a thought grid.
    """
    if isinstance(attention_mask, Layout):
        if dropout:
            raise ValueError(
                f"attention dropout is {dropout} in {type(module).__name__}, but thought attention has none: "
                "set the model's attention dropout to 0"
            )
        if kwargs.get("position_bias") is not None:
            raise ValueError(f"{type(module).__name__} passes position_bias, which thought attention does not know")
        return _attend(attention_mask, module, query, key, value, scaling, softcap, s_aux), None
    if _open.layout is not None:
        raise ValueError(f"{type(module).__name__} did not pass the thought layout on: it makes a mask of its own")
    options = dict(kwargs, scaling=scaling, dropout=dropout)
    text = _whole_text(module, query, key, value, attention_mask, options)
    if text is not None and fused_is_better(query, text.window, softcap, s_aux):
        return _attend(text, module, query, key, value, scaling, softcap, s_aux), None
    if isinstance(attention_mask, WindowMask):
        attention_mask = attention_mask.dense()
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is not None or _is_causal(module, options):
        attention_mask = _additive(attention_mask, query, key)
    return eager(module, query, key, value, attention_mask, **options)


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


def _whole_text(module: nn.Module, query, key, value, mask: Tensor | None, options: dict) -> Packed | None:
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


def _is_causal(module: nn.Module, options: dict) -> bool:
    causal = options.get("is_causal")
    return getattr(module, "is_causal", True) if causal is None else causal


def _attend(
    layout: Layout, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling, softcap, s_aux
) -> Tensor:
    """The output ``[B, S, Hq, Dv]`` under a layout.

    The tensors take autocast's dtype where it is on: rotary embeddings leave queries and keys in float32.
    """
    query, key, value = _as_autocast(query, key, value)
    return layout.attend(module, query, key, value, scale=scaling, softcap=softcap, sinks=s_aux).contiguous()


def _as_autocast(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.to(compute_dtype(x)) for x in tensors)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is computed in: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """A mask of ``sdpa`` (boolean, or None for causal) as eager attention adds it to the scores."""
    if mask is None:
        length, total = query.shape[2], key.shape[2]
        visible = torch.ones(length, total, dtype=torch.bool, device=query.device)
        mask = (visible.tril(total - length) if length > 1 else visible)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)


def register() -> None:
    """Make ``attn_implementation="qstar"`` known to transformers."""
    AttentionInterface.register(NAME, qstar_attention)
    AttentionMaskInterface.register(NAME, qstar_mask)


register()
