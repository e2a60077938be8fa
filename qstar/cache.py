"""Keys and values of a text that is read once, and of the thoughts at its last positions.

Thinking, speaking and generating share it: the text is never read twice, and thoughts are dropped without a trace.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from qstar.autocast import as_computed

AT_HAND = ("cpu",)  # devices whose values the host reads at once; a CPU writes a slice in a fifth of an index's time


class ThoughtCache(Cache):
    """The cache of a text ``[B, Hkv, N, D]`` and of thoughts ``[B, Hkv, Nq, r, T, D]`` at its last ``Nq`` positions.

    The first pass through the model fills the text. After :meth:`begin_step` a pass holds token ``t`` of every
    rationale and fills the thoughts at ``t``; no key is copied twice. :meth:`drop_thoughts` forgets them, and after
    :meth:`extend` a pass holds text that follows.

    Attributes:
        rationales: r.
        rationale_length: T.
        step: the token of the thoughts that a pass fills, int64 ``[]``; None while text is read.
    """

    layers: list[ThoughtCacheLayer]  # type: ignore[assignment]  # transformers' own are of its base class

    def __init__(self, rationales: int, rationale_length: int):
        super().__init__(layer_class_to_replicate=lambda: ThoughtCacheLayer(self))  # type: ignore[arg-type]
        self.rationales = rationales
        self.rationale_length = rationale_length
        self.step: Tensor | None = None

    @property
    def text_length(self) -> int:
        """N, the text tokens that have been read."""
        return self.layers[0].keys.shape[2] if self.layers and self.layers[0].is_initialized else 0

    def begin_step(self, step: int | Tensor) -> None:
        """Let the next pass fill token ``step`` of every rationale; the value of a tensor ``[]`` is not checked.

        Raises:
            ValueError: ``step`` is not one of a rationale's tokens.
        """
        if not isinstance(step, Tensor):
            if not 0 <= step < self.rationale_length:
                raise ValueError(f"step is {step}, but it must be in 0..{self.rationale_length - 1}")
            step = torch.full((), step, device=self.layers[0].keys.device)
        self.step = step

    def drop_thoughts(self) -> None:
        """Forget the thoughts, and keep the text as if nobody had thought about it."""
        self.step = None
        for layer in self.layers:
            layer.thought_keys = layer.thought_values = None

    def extend(self) -> None:
        """Let the next pass read text that follows what has been read.

        Raises:
            ValueError: there are thoughts, which belong to the positions that were the last.
        """
        if self.step is not None:
            raise ValueError("the cache holds thoughts about the text as it was: drop_thoughts() comes before extend()")


class ThoughtCacheLayer(DynamicLayer):
    """One layer's part of a :class:`ThoughtCache`."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: ThoughtCache):
        super().__init__()
        self.cache = cache
        self.thought_keys: Tensor | None = None
        self.thought_values: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values of a pass, and return them in the dtype that they are computed in."""
        key_states, value_states = as_computed(key_states, value_states)
        if self.cache.step is not None:
            self._fill_thoughts(self.cache.step, key_states, value_states)
        elif self.is_initialized:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
        else:
            self.keys, self.values = key_states, value_states
            self.is_initialized = True
        return key_states, value_states

    def thoughts(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the thoughts, ``[B, Hkv, Nq, r, T, D]``; tokens that were not read yet are undefined."""
        if self.thought_keys is None or self.thought_values is None:
            raise ValueError("the cache holds no thoughts: begin_step() and a pass come before they are read")
        return self.thought_keys, self.thought_values

    def _fill_thoughts(self, step: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        keys, values = (
            rearrange(x, "b h (n r) d -> b h n r d", r=self.cache.rationales) for x in (key_states, value_states)
        )
        if self.thought_keys is None or self.thought_values is None:
            self.thought_keys, self.thought_values = (
                x.new_empty(*x.shape[:4], self.cache.rationale_length, x.shape[4]) for x in (keys, values)
            )
        step = step.to(keys.device)  # layers may lie on several devices
        write_token(self.thought_keys, step, keys)
        write_token(self.thought_values, step, values)


def write_token(cache: Tensor, step: Tensor, token: Tensor) -> None:
    """Write ``token`` ``[..., D]`` into ``cache`` ``[..., T, D]`` at ``step`` ``[]``, which no GPU is asked for."""
    if step.device.type in AT_HAND:
        cache.select(-2, int(step)).copy_(token)
    else:
        cache.index_copy_(-2, step[None], token.unsqueeze(-2))
