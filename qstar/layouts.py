"""How the tokens of a pass are laid out: which text positions and thoughts they are, and so which keys they see.

A layout is opened around a pass of the model (:func:`layout`); the attention function finds it in the place of the mask
and calls :meth:`attend` in every layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor

from qstar.autocast import as_computed
from qstar.cache import ThoughtCache
from qstar_kernels import thought_attention, thought_attention_step


@dataclass(frozen=True)
class Packed:
    """All tokens of a thought grid at once, ``[B, N*C]``; ``slots`` = 1 is plain text.

    Attributes:
        slots: C, the slots at one position.
        rationales: r.
        start: first text position that each position may see, ``[B, N]`` int64, or None.
        window: the layer's sliding window in positions, set by the mask function.
        cache: keeps the keys and values of plain text, where given.
    """

    slots: int
    rationales: int = 1
    start: Tensor | None = None
    window: int | None = None
    cache: ThoughtCache | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """The output ``[B, S, Hq, Dv]`` of the attention that is called, for ``query`` ``[B, Hq, S, D]``."""
        if self.cache is not None:
            self.cache.take_in(key, value)
        q, k, v = (rearrange(x, "b h (n c) d -> b h n c d", c=self.slots) for x in (query, key, value))
        out = thought_attention(
            q, k, v, rationales=self.rationales, window=self.window, text_start=self.start, **options
        )
        return rearrange(out, "b h n c d -> b (n c) h d")


@dataclass(frozen=True)
class Step:
    """One token of every rationale at the last positions of a text whose keys lie in ``cache``, ``[B, Nq*r]``."""

    cache: ThoughtCache
    step: int | Tensor
    start: Tensor | None = None
    window: int | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """As :meth:`Packed.attend`, with all keys and values of the cache."""
        layer = self.cache.take_in(key, value)
        out = thought_attention_step(
            rearrange(query, "b h (n r) d -> b h n r d", r=self.cache.rationales),
            layer.keys,
            layer.values,
            *layer.thoughts(),
            self.step,
            window=self.window,
            text_start=self.start,
            **options,
        )
        return rearrange(out, "b h n r d -> b (n r) h d")


@dataclass(frozen=True)
class Extension:
    """Text that follows the text in ``cache``, ``[B, n]``; ``start`` ``[B, N + n]`` is that of all of it.

    Every new token is to the text before it what the first token of a thought is: it sees that text and itself.
    """

    cache: ThoughtCache
    start: Tensor | None = None
    window: int | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """As :meth:`Packed.attend`, with all keys and values of the cache."""
        layer = self.cache.take_in(key, value)
        own_keys, own_values = (x[:, :, -query.shape[2] :, None, None] for x in (layer.keys, layer.values))
        out = thought_attention_step(
            query[:, :, :, None],
            layer.keys[:, :, :-1],
            layer.values[:, :, :-1],
            own_keys,
            own_values,
            0,
            window=self.window,
            text_start=None if self.start is None else self.start[:, 1:],
            **options,
        )
        return rearrange(out, "b h n 1 d -> b n h d")


Layout = Packed | Step | Extension


def attend(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The output ``[B, S, Hq, Dv]`` under a layout, computed in autocast's dtype where that is on."""
    query, key, value = as_computed(query, key, value)
    return layout.attend(query, key, value, scale=scaling, softcap=softcap, sinks=sinks).contiguous()


@dataclass
class _Open:
    layout: Layout | None = None


# A module-level slot and not a ContextVar: the backward's recomputation and its threads must see the same one.
_open = _Open()


@contextlib.contextmanager
def layout(value: Layout) -> Iterator[None]:
    """Make every ``qstar`` attention inside see the tokens of its input as ``value`` lays them out."""
    previous, _open.layout = _open.layout, value
    if value.cache is not None:
        value.cache.begin_pass()
    try:
        yield
    finally:
        _open.layout = previous
    if value.cache is not None:
        value.cache.end_pass()


def open_layout() -> Layout | None:
    """The layout of the pass that is under way, None where a model is used without thoughts."""
    return _open.layout
