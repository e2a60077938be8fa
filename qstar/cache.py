"""Keys and values of a text that is read once, and of the thoughts at its last positions.

Thinking and speaking share it: the text is never read twice, and thoughts are dropped without a trace. What
is kept is what each attention of the model was given, in the order of its calls. So it does not matter what a model
would put into a cache of transformers: compressed keys, keys of several layers, or none.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

AT_HAND = ("cpu",)  # devices whose values the host reads at once; a CPU writes a slice in a fifth of an index's time


class ThoughtCache:
    """The cache of a text ``[B, Hkv, N, D]`` and of thoughts ``[B, Hkv, Nq, r, T, D]`` at its last ``Nq`` positions.

    The first pass through the model fills the text. After :meth:`begin_step` a pass holds token ``t`` of every
    rationale and fills the thoughts at ``t``; no key is copied twice. :meth:`drop_thoughts` forgets them, and after
    :meth:`extend` a pass holds text that follows.

    Attributes:
        rationales: r.
        rationale_length: T.
        step: the token of the thoughts that a pass fills, int64 ``[]``; None while text is read.
        layers: one for each attention of the model, in the order in which a pass calls them.
    """

    def __init__(self, rationales: int, rationale_length: int):
        self.rationales = rationales
        self.rationale_length = rationale_length
        self.step: Tensor | None = None
        self.layers: list[CachedLayer] = []
        self._calls = 0
        self._takes_text = True

    @property
    def text_length(self) -> int:
        """N, the text tokens that have been read."""
        return self.layers[0].keys.shape[2] if self.layers else 0

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
        self._takes_text = True

    def begin_pass(self) -> None:
        """A pass begins: its first attention is the first layer's."""
        self._calls = 0

    def end_pass(self) -> None:
        """A pass is over; the next one reads no text unless it is asked to.

        Raises:
            ValueError: not every layer's attention was called.
        """
        self._takes_text = False
        if self._calls != len(self.layers):
            raise ValueError(
                f"a pass called {self._calls} attentions, but the one that read the text {len(self.layers)}"
            )

    def take_in(self, keys: Tensor, values: Tensor) -> CachedLayer:
        """The layer of the attention that is called next, with its new ``keys`` and ``values`` ``[B, Hkv, S, D]``."""
        if self.step is None and not self._takes_text:
            raise ValueError(
                "the text has been read: begin_step() comes before its thoughts, extend() before more of it"
            )
        index, self._calls = self._calls, self._calls + 1
        if index == len(self.layers):
            if self.step is not None:
                raise ValueError(f"a pass calls more attentions than the {index} that read the text")
            self.layers.append(CachedLayer(keys, values))
            return self.layers[index]
        layer = self.layers[index]
        if self.step is None:
            layer.append_text(keys, values)
        else:
            grid = (rearrange(x, "b h (n r) d -> b h n r d", r=self.rationales) for x in (keys, values))
            layer.fill_thoughts(self.step, self.rationale_length, *grid)
        return layer


class CachedLayer:
    """What one attention of the model was given.

    Attributes:
        keys: of the text, ``[B, Hkv, N, D]``.
        values: of the text, ``[B, Hkv, N, Dv]``.
        thought_keys: ``[B, Hkv, Nq, r, T, D]``, undefined where no token was read yet; None where there are none.
        thought_values: ``[B, Hkv, Nq, r, T, Dv]``, likewise.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values
        self.thought_keys: Tensor | None = None
        self.thought_values: Tensor | None = None

    def append_text(self, keys: Tensor, values: Tensor) -> None:
        """Put more text ``[B, Hkv, n, D]`` behind what is there."""
        self.keys = torch.cat([self.keys, keys], dim=2)
        self.values = torch.cat([self.values, values], dim=2)

    def fill_thoughts(self, step: Tensor, length: int, keys: Tensor, values: Tensor) -> None:
        """Write token ``step`` ``[]`` of thoughts of ``length`` tokens, keys and values ``[B, Hkv, Nq, r, D]``."""
        if self.thought_keys is None or self.thought_values is None:
            self.thought_keys, self.thought_values = (
                x.new_empty(*x.shape[:4], length, x.shape[4]) for x in (keys, values)
            )
        step = step.to(keys.device)  # layers may lie on several devices
        write_token(self.thought_keys, step, keys)
        write_token(self.thought_values, step, values)

    def thoughts(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the thoughts.

        Raises:
            ValueError: there are none.
        """
        if self.thought_keys is None or self.thought_values is None:
            raise ValueError("the cache holds no thoughts: begin_step() and a pass come before they are read")
        return self.thought_keys, self.thought_values


def write_token(cache: Tensor, step: Tensor, token: Tensor) -> None:
    """Write ``token`` ``[..., D]`` into ``cache`` ``[..., T, D]`` at ``step`` ``[]``, which no GPU is asked for."""
    if step.device.type in AT_HAND:
        cache.select(-2, int(step)).copy_(token)
    else:
        cache.index_copy_(-2, step[None], token.unsqueeze(-2))
