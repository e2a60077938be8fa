"""How the tokens of a pass are laid out: which text positions and thoughts they are, and so which keys they see.

A layout is opened around a pass of the model (:func:`layout`); the attention function finds it in the place of the mask
and calls :meth:`attend` in every layer.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from qstar.autocast import as_computed
from qstar.cache import CachedLayer, KeptLayer, KeptText, ThoughtCache, by_rationale
from qstar_kernels import thought_attention, thought_attention_part, thought_attention_step


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
    cache: ThoughtCache | KeptText | None = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layer: CachedLayer | KeptLayer | None, **options: Any
    ) -> Tensor:
        """The output ``[B, S, Hq, Dv]`` of the attention that is called, for ``query`` ``[B, Hq, S, D]``."""
        if layer is not None:
            layer.append_text(key, value, self.window)
        q, k, v = (rearrange(x, "b h (n c) d -> b h n c d", c=self.slots) for x in (query, key, value))
        out = thought_attention(
            q, k, v, rationales=self.rationales, window=self.window, text_start=self.start, **options
        )
        return rearrange(out, "b h n c d -> b (n c) h d")


@dataclass(frozen=True)
class Part:
    """The thoughts at some positions of a text that was read before, all their tokens, ``[B, n*r*T]``.

    Attributes:
        cache: what the text's attentions were given.
        stop: the position after the last one; where ``at`` is None the others come right before it.
        rationales: r.
        tokens: T.
        start: as of :class:`Packed`, of all the text ``[B, N]``.
        window: as of :class:`Packed`.
        at: the positions, ``[B, n]`` int64.
    """

    cache: KeptText
    stop: int
    rationales: int
    tokens: int
    start: Tensor | None = None
    window: int | None = None
    at: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: KeptLayer, **options: Any) -> Tensor:
        """As :meth:`Packed.attend`, with all keys and values of the layer."""
        assert layer.keys is not None and layer.values is not None  # the pass over the text is over
        shape = dict(r=self.rationales, t=self.tokens)
        q, k, v = (rearrange(x, "b h (n r t) d -> b h n r t d", **shape) for x in (query, key, value))
        out = thought_attention_part(
            q,
            layer.keys[:, :, : self.stop],
            layer.values[:, :, : self.stop],
            k,
            v,
            window=self.window,
            text_start=None if self.start is None else self.start[:, : self.stop],
            positions=self.at,
            **options,
        )
        return rearrange(out, "b h n r t d -> b (n r t) h d")


@dataclass(frozen=True)
class Step:
    """One token of every rationale at some positions of a text whose keys lie in ``cache``, ``[B, Nq*r]``.

    They are the last ones, or those of ``at`` ``[B, Nq]`` int64.
    """

    cache: ThoughtCache
    step: int | Tensor
    start: Tensor | None = None
    window: int | None = None
    at: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: CachedLayer, **options: Any) -> Tensor:
        """As :meth:`Packed.attend`, with all keys and values of the layer."""
        rationales = self.cache.rationales
        query, key, value = (by_rationale(x, rationales) for x in (query, key, value))
        layer.fill_thoughts(self.step, self.cache.rationale_length, key, value)
        out = thought_attention_step(
            query,
            layer.keys,
            layer.values,
            *layer.thoughts(),
            self.step,
            window=self.window,
            text_start=held_start(self.start, layer),
            positions=None if self.at is None else self.at - layer.gone,
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
    _made: dict[str, Tensor | None] = field(default_factory=dict, init=False, repr=False, compare=False)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: CachedLayer,
        scale: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """As :meth:`Packed.attend`, with all keys and values of the layer."""
        layer.append_text(key, value, self.window)
        keys, values = layer.keys, layer.values
        if softcap is None and sinks is None:
            out = F.scaled_dot_product_attention(
                query, keys, values, self.mask(query, layer), scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
            )
            return out.transpose(1, 2)
        start = held_start(self.start, layer)
        own_keys, own_values = (x[:, :, -query.shape[2] :, None, None] for x in (keys, values))
        out = thought_attention_step(
            query[:, :, :, None],
            keys[:, :, :-1],
            values[:, :, :-1],
            own_keys,
            own_values,
            0,
            window=self.window,
            text_start=None if start is None else start[:, 1:],
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        return rearrange(out, "b h n 1 d -> b n h d")

    def mask(self, query: Tensor, layer: CachedLayer) -> Tensor | None:
        """What each new token sees of what ``layer`` holds, ``[B, 1, n, N + n - gone]``; None where that is all.

        The layers of a pass that share a window share it, and with it the mask.
        """
        if "mask" not in self._made:
            self._made["mask"] = self._make_mask(query.shape[2], layer, query.device)
        return self._made["mask"]

    def _make_mask(self, new: int, layer: CachedLayer, device: torch.device) -> Tensor | None:
        held = layer.length - layer.gone
        window = None if self.window is None or held <= self.window else self.window
        if new == 1 and window is None and self.start is None:
            return None
        key = torch.arange(held, device=device)
        last = key[-new:, None]
        seen = key <= last
        if window is not None:
            seen &= key > last - window
        start = held_start(self.start, layer)
        if start is None:
            return seen[None, None]
        return ((seen & (key >= start[:, -new:, None])) | (key == last))[:, None]  # padding sees itself, not nothing


@dataclass(frozen=True)
class Together:
    """Several layouts in one pass, whose tokens follow each other: each sees what those before it have put down.

    Attributes:
        parts: the layouts, over one cache.
        lengths: how many tokens of the pass belong to each.
        window: as for the parts.
    """

    parts: tuple[Step | Extension, ...]
    lengths: tuple[int, ...]
    window: int | None = None

    @property
    def cache(self) -> ThoughtCache:
        """The one of all parts."""
        return self.parts[0].cache

    @functools.cached_property
    def _windowed(self) -> tuple[Step | Extension, ...]:
        return tuple(replace(part, window=self.window) for part in self.parts)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: CachedLayer, **options: Any) -> Tensor:
        """As :meth:`Packed.attend`."""
        pieces = zip(self._windowed, *(x.split(self.lengths, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([part.attend(q, k, v, layer, **options) for part, q, k, v in pieces], dim=1)


Layout = Packed | Part | Step | Extension | Together


def held_start(start: Tensor | None, layer: CachedLayer) -> Tensor | None:
    """``start`` ``[B, N]`` of all text as indices into what ``layer`` holds of it, ``[B, N - gone]``."""
    if start is None or not layer.gone:
        return start
    return (start[:, layer.gone :] - layer.gone).clamp(min=0)


def attend(
    layout: Layout,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The output ``[B, S, Hq, Dv]`` of attention ``module`` under a layout, in autocast's dtype where that is on."""
    query, key, value = as_computed(query, key, value)
    layer: Any = None if layout.cache is None else layout.cache.next_layer(module)
    return layout.attend(query, key, value, layer, scale=scaling, softcap=softcap, sinks=sinks).contiguous()


class _Open(threading.local):
    """The layout of each thread's pass. The backward needs none: its layers were handed theirs as an argument."""

    layout: Layout | None = None


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
