"""Thought attention inside transformers: an attention function and a mask function, both named ``qstar``.

While a :func:`layout` is open, the mask function hands that layout to every layer in the place of a mask, and the
attention function reads from it which keys each query may see. transformers carries it as an opaque object, so it
survives gradient checkpointing and needs no code of any model. Without a layout both behave like ``sdpa``, or like the
model's own eager attention where that knows something that sdpa does not (soft-cap, sinks).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qstar_kernels import thought_attention, thought_attention_step

NAME = "qstar"


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
    step: int
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
        self.step: int | None = None

    def begin_step(self, step: int) -> None:
        """Let the next pass fill token ``step`` of every rationale."""
        if not 0 <= step < self.rationale_length:
            raise ValueError(f"step is {step}, but it must be in 0..{self.rationale_length - 1}")
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
        self.thought_keys[..., self.cache.step, :] = keys
        self.thought_values[..., self.cache.step, :] = values
        return key_states, value_states


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


def qstar_mask(*, local_size: int | None = None, **kwargs) -> Layout | Tensor | None:
    """The mask function: the open layout with this layer's window; without one, the mask of ``sdpa``."""
    if _open.layout is None:
        return sdpa_mask(**kwargs) if local_size is None else sdpa_mask(local_size=local_size, **kwargs)
    return replace(_open.layout, window=local_size)


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
        query, key, value = _as_autocast(query, key, value)
        sinks = None if s_aux is None else s_aux.to(query.dtype)
        out = attention_mask.attend(module, query, key, value, scale=scaling, softcap=softcap, sinks=sinks)
        return out, None
    if _open.layout is not None:
        raise ValueError(f"{type(module).__name__} did not pass the thought layout on: it makes a mask of its own")
    options = dict(kwargs, scaling=scaling, dropout=dropout)
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["s_aux"] = s_aux
    eager = sys.modules[type(module).__module__].eager_attention_forward
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None or causal:
        attention_mask = _additive(attention_mask, query, key)
    return eager(module, query, key, value, attention_mask, **options)


def _as_autocast(*tensors: Tensor) -> Iterator[Tensor]:
    """The tensors in autocast's dtype where it is on: rotary embeddings leave queries and keys in float32."""
    device = tensors[0].device.type
    enabled = torch.is_autocast_enabled(device)
    return (x.to(torch.get_autocast_dtype(device)) if enabled else x for x in tensors)


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
