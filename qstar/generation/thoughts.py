"""Thoughts at the last positions of a cached text, in K + 1 passes: what is forced travels with what precedes it.

The start token is read with the text token that it stands behind, the end token with the last sampled one. A thought at
the last position alone is text that is forgotten again, and ordinary attention reads it; thoughts at several positions
see the text up to their own, and go through thought attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qstar.cache import ThoughtCache
from qstar.generation.text import TextSoFar
from qstar.generation.when import ThinkWhen
from qstar.layouts import Extension, Layout, Packed, Step, Together
from qstar.model import QuietStarModel

POSITION_BITS = 32


@dataclass(frozen=True)
class Predictions:
    """What comes next at the last ``Nq`` positions of a text.

    Attributes:
        logits: after the thought, where there was one, at least fp32, ``[B, Nq, V]``; thought tokens at ``-inf``.
        thoughts: ``[B, Nq, K]`` int64; the end token in all places where there was no thought.
        weight: of the thought, ``[B, Nq]``; 0 where there was none.
        thought_at: where there was a thought, ``[B, Nq]`` boolean.
    """

    logits: Tensor
    thoughts: Tensor
    weight: Tensor
    thought_at: Tensor


@dataclass
class Reader:
    """Reads a text and thoughts at its end into a cache, and counts the passes.

    Attributes:
        model: the model.
        thought_tokens: K.
        when: where to think.
        temperature: thoughts are sampled at.
        seed: of the thoughts.
        returned: sequences for each prompt: so many rows that follow each other draw with random numbers of their own.
        cache: of the text.
        passes: through the model so far.
    """

    model: QuietStarModel
    thought_tokens: int
    when: ThinkWhen
    temperature: float
    seed: int
    returned: int
    cache: ThoughtCache
    passes: int = 0

    def __post_init__(self) -> None:
        self.head = self.model.language_head()

    def _pass(self, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        self.passes += 1
        return self.model.read(tokens, positions, layout)

    def read(self, text: TextSoFar) -> Tensor:
        """Read what has not been read of ``text``: hidden states ``[B, n, E]``."""
        begin, end = self.cache.text_length, text.length
        start = text.start(end)
        layout = Extension(self.cache, start=start) if begin else Packed(slots=1, start=start, cache=self.cache)
        return self._pass(text.tokens[:, begin:], text.positions(begin, end), layout)

    def predict(self, text: TextSoFar, ahead: int = 0, bases: Tensor | None = None) -> Predictions:
        """Think at the last ``ahead + 1`` positions of ``text``, together, and say what follows each of them.

        Args:
            text: at least its last token has not been read.
            ahead: how many of its last tokens are guesses.
            bases: hidden states of the last of its tokens that have been read, ``[B, n, E]``; with those not read they
                must reach back to the first position that is thought at.
        """
        if self.when.never:
            hidden = self.read(text)
        else:
            opened = self._open(text, ahead + 1)
            hidden, state = opened[:, : -ahead - 1], opened[:, -ahead - 1 :]
        base = (hidden if bases is None else torch.cat([bases, hidden], dim=1))[:, -ahead - 1 :]
        positions = text.positions(text.length - ahead - 1, text.length)
        base_logits = None if self._always else self.head.logits(base)
        where = torch.ones_like(positions, dtype=torch.bool)
        if base_logits is not None:
            where = self.when(positions, base_logits)
            if not where.any():
                self.cache.cut(text.length)
                nothing = self._no_thoughts(positions)
                return Predictions(base_logits, nothing, torch.zeros_like(base_logits[..., 0]), where)
        thoughts, after = self._think(text, positions, state)
        self.cache.cut(text.length)
        index = torch.arange(base.shape[:2].numel(), device=base.device)
        mixed, weight = self.model.mix(base.flatten(0, 1), after.flatten(0, 1), index)
        logits, weight = self.head.logits(mixed).unflatten(0, positions.shape), weight.view(positions.shape)
        if base_logits is not None:
            logits = torch.where(where[..., None], logits, base_logits)
            thoughts = torch.where(where[..., None], thoughts, self._no_thoughts(positions))
            weight = torch.where(where, weight, 0)
        return Predictions(logits, thoughts, weight, where)

    @property
    def _always(self) -> bool:
        return self.when == ThinkWhen()

    def _no_thoughts(self, positions: Tensor) -> Tensor:
        return positions.new_full((*positions.shape, self.thought_tokens), self.model.qstar.end_token_id)

    def _open(self, text: TextSoFar, queries: int) -> Tensor:
        """Read what has not been read of ``text`` and, in the same pass, the start tokens of thoughts at its end.

        Returns:
            Hidden states of both, ``[B, n + Nq, E]``.
        """
        begin, end = self.cache.text_length, text.length
        starts = text.tokens.new_full((len(text.tokens), queries), self.model.qstar.start_token_id)
        tokens = torch.cat([text.tokens[:, begin:], starts], dim=1)
        positions = torch.cat([text.positions(begin, end), text.positions(end - queries, end) + 1], dim=1)
        layout: Layout = Extension(self.cache, start=text.start(end + 1))
        if queries > 1:
            reading = Extension(self.cache, start=text.start(end))
            layout = Together((reading, self._step(text, 0)), (end - begin, queries))
        return self._pass(tokens, positions, layout)

    def _step(self, text: TextSoFar, step: int) -> Step:
        return Step(self.cache, step, start=text.start(text.length))

    def _think(self, text: TextSoFar, positions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Sample and read thoughts whose start tokens have been read.

        Args:
            text: what is thought about.
            positions: of the tokens that thoughts stand behind, ``[B, Nq]``.
            state: of the start tokens, ``[B, Nq, E]``.

        Returns:
            Thoughts ``[B, Nq, K]`` and the states of their end tokens ``[B, Nq, E]``.
        """
        sequence = torch.arange(len(positions), device=positions.device)[:, None] % self.returned
        rows = ((sequence << POSITION_BITS) + positions).flatten()
        ends = torch.full_like(positions, self.model.qstar.end_token_id)
        queries, thoughts = positions.shape[1], []
        for step in range(self.thought_tokens):
            sampling = dict(seed=self.seed, step=step, rows=rows, temperature=self.temperature)
            token = self.model.next_of_thoughts(self.head, state.flatten(0, 1), **sampling).view_as(positions)
            thoughts.append(token)
            tokens, at = [token], [step + 1]
            if len(thoughts) == self.thought_tokens:
                tokens, at = [token, ends], [step + 1, step + 2]
            layout: Layout
            if queries == 1:
                layout = Extension(self.cache, start=text.start(self.cache.text_length + len(tokens)))
            elif len(tokens) == 1:
                layout = self._step(text, step + 1)
            else:
                layout = Together(tuple(self._step(text, each) for each in at), (queries,) * len(at))
            state = self._pass(
                torch.cat(tokens, dim=1), torch.cat([positions + 1 + each for each in at], dim=1), layout
            )
        return torch.stack(thoughts, dim=-1), state[:, -queries:]
