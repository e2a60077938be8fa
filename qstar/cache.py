"""Keys and values of a text that is read once, and of the thoughts at some of its positions.

Thinking, speaking and generating share it: the text is never read twice, and thoughts are dropped without a trace. What
is kept is what each attention of the model was given, in the order of its calls. So it does not matter what a model
would put into a cache of transformers: compressed keys, keys of several layers, or none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

NO_PARTS = (
    "its grids cannot be read in parts, so there must be no max_grid_tokens (0 in the settings of a run) and no "
    "positions_per_row"
)
AT_HAND = ("cpu",)  # devices whose values the host reads at once; a CPU writes a slice in a fifth of an index's time


class ThoughtCache:
    """The cache of a text ``[B, Hkv, N, D]`` and of thoughts ``[B, Hkv, Nq, r, T, D]`` at ``Nq`` positions.

    Text and thoughts are filled by the layouts of :mod:`qstar.layouts`; no key is copied twice. The text can be cut
    (:meth:`cut`), and its rows taken in another order (:meth:`take_rows`).

    Attributes:
        rationales: r.
        rationale_length: T.
        layers: one for each attention of the model, in the order in which a pass calls them.
    """

    def __init__(self, rationales: int, rationale_length: int):
        self.rationales = rationales
        self.rationale_length = rationale_length
        self.layers: list[CachedLayer] = []
        self._calls = 0

    @property
    def text_length(self) -> int:
        """N, the text tokens that have been read."""
        return self.layers[0].length if self.layers else 0

    def drop_thoughts(self) -> None:
        """Forget the thoughts, and keep the text as if nobody had thought about it."""
        for layer in self.layers:
            layer.thought_keys = layer.thought_values = None

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens of the text, and no thoughts.

        Raises:
            ValueError: the text has fewer, or a window has let go of tokens that would be needed again.
        """
        self.drop_thoughts()
        for layer in self.layers:
            layer.cut(length)

    def let_go(self) -> None:
        """Let go of text that lies before the sliding window of a layer: no token to come sees it.

        A layer then holds between one and two windows, and moves what it keeps once a window.
        """
        for layer in self.layers:
            layer.let_go()

    def take_rows(self, rows: Tensor) -> None:
        """Make row ``b`` of the batch what was row ``rows[b]``; ``rows`` is ``[B']`` int64."""
        self.drop_thoughts()
        for layer in self.layers:
            layer.take_rows(rows)

    def begin_pass(self) -> None:
        """A pass begins: its first attention is the first layer's."""
        self._calls = 0

    def end_pass(self) -> None:
        """A pass is over.

        Raises:
            ValueError: not every layer's attention was called.
        """
        if self._calls != len(self.layers):
            raise ValueError(
                f"a pass called {self._calls} attentions, but the one that read the text {len(self.layers)}"
            )

    def next_layer(self, module: nn.Module) -> CachedLayer:
        """The layer of the attention ``module``, which is called next: known by the order of the calls.

        It is a new one, without text, in the pass that reads the first.

        Raises:
            ValueError: the pass that read the text called fewer attentions.
        """
        index, self._calls = self._calls, self._calls + 1
        if index == len(self.layers):
            if index and self.layers[0].passes > 1:
                raise ValueError(f"a pass calls more attentions than the {index} that read the text")
            self.layers.append(CachedLayer())
        self.layers[index].passes += 1
        return self.layers[index]


class CachedLayer:
    """What one attention of the model was given.

    Attributes:
        length: N, tokens of text that it was given.
        window: in positions, where the attention has a sliding one.
        passes: how many called it.
        thought_keys: ``[B, Hkv, Nq, r, T, D]``, undefined where no token was read yet; None where there are none.
        thought_values: ``[B, Hkv, Nq, r, T, Dv]``, likewise.
    """

    def __init__(self) -> None:
        self.length = 0
        self.window: int | None = None
        self.passes = 0
        self.thought_keys: Tensor | None = None
        self.thought_values: Tensor | None = None
        self._room: tuple[Tensor, Tensor] | None = None  # keys and values [B, Hkv, room, D], the text first
        self._held = 0

    @property
    def gone(self) -> int:
        """How many tokens at the beginning of the text were let go."""
        return self.length - self._held

    @property
    def keys(self) -> Tensor:
        """Of the text, ``[B, Hkv, N - gone, D]``."""
        return self._text(0)

    @property
    def values(self) -> Tensor:
        """Of the text, ``[B, Hkv, N - gone, Dv]``."""
        return self._text(1)

    def _text(self, which: int) -> Tensor:
        if self._room is None:
            raise ValueError("the cache holds no text: a pass over some comes before its thoughts")
        return self._room[which][:, :, : self._held]

    def append_text(self, keys: Tensor, values: Tensor, window: int | None = None) -> None:
        """Put text ``[B, Hkv, n, D]`` behind what is there; the first is kept as it is, without a copy.

        Raises:
            ValueError: there are thoughts, which belong to the positions that were the last; what is there has another
                dtype.
        """
        if self.thought_keys is not None:
            raise ValueError(
                "the cache holds thoughts about the text as it was: drop_thoughts() comes before more text"
            )
        held = self._held + keys.shape[2]
        if self._room is None:
            self._room = keys, values
        else:
            if keys.dtype != self._room[0].dtype:
                raise ValueError(
                    f"the cache holds keys of {self._room[0].dtype}, but is given {keys.dtype}: the model has been "
                    "converted since, or autocast was on or off; read the text afresh"
                )
            frozen = self._room[0].is_inference() and not torch.is_inference_mode_enabled()
            if frozen or held > self._room[0].shape[2]:
                self._room = roomier(self._room[0], self._held, held), roomier(self._room[1], self._held, held)
            for room, new in zip(self._room, (keys, values), strict=True):
                room[:, :, self._held : held] = new
        self._held, self.length, self.window = held, self.length + keys.shape[2], window

    def cut(self, length: int) -> None:
        """As :meth:`ThoughtCache.cut`."""
        if not self.gone <= length <= self.length:
            raise ValueError(f"length is {length}, but it must be in {self.gone}..{self.length}: what the cache holds")
        self._held, self.length = length - self.gone, length

    def let_go(self) -> None:
        """As :meth:`ThoughtCache.let_go`."""
        if self._room is None or self.window is None or self._held <= 2 * self.window:
            return
        kept = self.window - 1
        self._room = tuple(roomier(x[:, :, self._held - kept : self._held], kept, kept) for x in self._room)  # type: ignore[assignment]
        self._held = kept

    def take_rows(self, rows: Tensor) -> None:
        """As :meth:`ThoughtCache.take_rows`."""
        self._room = self._text(0).index_select(0, rows), self._text(1).index_select(0, rows)

    def fill_thoughts(self, step: int | Tensor, length: int, keys: Tensor, values: Tensor) -> None:
        """Write token ``step`` of thoughts of ``length`` tokens, keys and values ``[B, Hkv, Nq, r, D]``."""
        if self.thought_keys is None or self.thought_values is None:
            self.thought_keys, self.thought_values = (
                x.new_empty(*x.shape[:4], length, x.shape[4]) for x in (keys, values)
            )
        write_token(self.thought_keys, step, keys)
        write_token(self.thought_values, step, values)

    def thoughts(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the thoughts.

        Raises:
            ValueError: there are none.
        """
        if self.thought_keys is None or self.thought_values is None:
            raise ValueError("the cache holds no thoughts: their first token comes before they are read")
        return self.thought_keys, self.thought_values


class KeptText:
    """Keys and values of a text that is read once, with their gradients: what passes over parts of its grid see.

    A checkpointed layer is called again in the backward, in an order of its own, so layers are known by their modules.
    """

    def __init__(self) -> None:
        self._layers: dict[nn.Module, KeptLayer] = {}
        self._differentiated = False
        self._read = False

    def begin_pass(self) -> None:
        """A pass begins; the first one reads the text."""
        self._differentiated = torch.is_grad_enabled()

    def end_pass(self) -> None:
        """A pass is over."""
        self._read = True

    def next_layer(self, module: nn.Module) -> KeptLayer:
        """The layer of the attention ``module``; a new one in the pass that reads the text.

        Raises:
            ValueError: the module attends twice in a pass, or did not attend to the text, or attends without gradients,
                as it does where its layer is checkpointed in the reentrant way.
        """
        name = type(module).__name__
        if self._read:
            if module not in self._layers:
                raise ValueError(f"{name} attends to thoughts, but not to the text: {NO_PARTS}")
            return self._layers[module]
        if module in self._layers:
            raise ValueError(f"{name} attends more than once in a pass: {NO_PARTS}")
        if torch.is_grad_enabled() != self._differentiated:
            raise ValueError(f"{name} attends without gradients, as under use_reentrant=True: {NO_PARTS}")
        return self._layers.setdefault(module, KeptLayer())


@dataclass
class KeptLayer:
    """Of one attention, ``[B, Hkv, N, D]`` and ``[B, Hkv, N, Dv]``."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def append_text(self, keys: Tensor, values: Tensor, window: int | None = None) -> None:
        """Keep them; a layer that is computed again for its gradient gives the same once more."""
        if self.keys is None:
            self.keys, self.values = keys, values


def roomier(text: Tensor, held: int, needed: int) -> Tensor:
    """A copy of the first ``held`` tokens of ``text`` ``[B, H, N, D]`` with room for ``needed`` and as many again."""
    room = text.new_empty(*text.shape[:2], 2 * needed, text.shape[3])
    room[:, :, :held] = text[:, :, :held]
    return room


def write_token(cache: Tensor, step: int | Tensor, token: Tensor) -> None:
    """Write ``token`` ``[..., D]`` into ``cache`` ``[..., T, D]`` at ``step``, which no GPU is asked for."""
    if isinstance(step, Tensor) and cache.device.type not in AT_HAND:
        cache.index_copy_(-2, step.to(cache.device)[None], token.unsqueeze(-2))  # layers may lie on several devices
    else:
        cache.select(-2, int(step)).copy_(token)


def by_rationale(x: Tensor, rationales: int) -> Tensor:
    """``[B, H, Nq*r, D]`` as ``[B, H, Nq, r, D]``."""
    return rearrange(x, "b h (n r) d -> b h n r d", r=rationales)
