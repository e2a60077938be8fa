"""Talk, the second of the paper's three steps: predict the text after a thought, mixed with the prediction without.

In training all text and all thoughts are one packed pass (:func:`talk`), or the text is one and the thoughts at some of
its positions are another (:func:`read_base`, :func:`talk_part`); where a model answers, a thought is read token by
token into the cache of the text (:func:`speak`). ``learning.py`` goes on from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import repeat
from torch import Tensor
from torch.profiler import record_function

from qstar.cache import KeptText
from qstar.grid import IGNORED, Counts, Text, ThoughtGrid
from qstar.layouts import Packed, Part
from qstar.model import QuietStarModel
from qstar.thinking import Reading, advance, evaluating


@dataclass
class Talk:
    """Log-probabilities of the text, fp32 nats; 0 where there is nothing to predict.

    Attributes:
        loss: ``(NLL_base + NLL_talk) / 2``, of a part its share of ``NLL_talk / 2``; of all this it alone and
            ``policy`` carry gradients.
        log_base: without thoughts, ``[B, N]``; all of it in a part as well.
        ahead: the text position that each talk step stands at, ``[N, m]`` int64.
        log_talk: of ``x_{i+k+1}`` after the thought at ``i``, ``[B, N, r, m]``.
        weight: of the thought in the mix, ``[B, N, r, m]``.
        targets: what ``log_talk`` scores, ``[B, N, m]`` int64, ``IGNORED`` where nothing.
        policy: states that predict the sampled tokens, ``[B, N, r, K, E]``.
    """

    loss: Tensor
    log_base: Tensor
    ahead: Tensor
    log_talk: Tensor
    weight: Tensor
    targets: Tensor
    policy: Tensor


def read_grid(model: QuietStarModel, text: Text, grid: ThoughtGrid, thoughts: Tensor) -> Tensor:
    """One packed pass over text and thoughts: hidden states ``[B, N*C, E]`` from thoughts ``[B, N, r, K]``."""
    model.check_rotary_factors(text.positions, grid.rationale_length)
    tokens = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    return model.read(tokens, grid.position_ids(text.positions), Packed(grid.slots, grid.rationales, start=text.start))


def talk(model: QuietStarModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, counts: Counts | None = None) -> Talk:
    """Score the text with and without thoughts, in one packed pass (paper, section 4.3).

    Args:
        model: the model.
        text: the text, ``[B, N]``.
        grid: how many rationales of how many tokens.
        thoughts: the thoughts to read, ``[B, N, r, K]`` int64.
        counts: what the means of the loss are taken over; over this batch by default.
    """
    counts = text.counts(grid) if counts is None else counts
    with record_function("qstar::talk"):
        base, policy, after = grid.split(read_grid(model, text, grid, thoughts))
        rows = TalkRows.of(text, grid, counts)
        mixed, weight = rows.mix(model, base, after)
        base = base.flatten(0, 1)
        total, log_prob = model.language_head().log_prob_sum(
            torch.cat([base.to(mixed.dtype), mixed]),
            torch.cat([text.targets.flatten(), rows.targets]),
            torch.cat([shares(text.targets, counts.text).flatten(), rows.shares]),
        )
        log_base, log_talk = log_prob.split([len(base), len(mixed)])
    return rows.talk(-total / 2, log_base.view(text.tokens.shape), log_talk, weight, policy)


class TalkRows(NamedTuple):
    """What the states after thoughts are scored on, a row for each talk step of each thought: (b, n, r, m) in order.

    Attributes:
        grid: the thought grid.
        ahead: the text position that each step stands at, ``[N, m]`` int64; of the positions of a part.
        at_positions: what each step at a position must predict, ``[B, N, m]`` int64.
        targets: the same of each row, ``[R]``.
        shares: the weight of each row in the mean over the talk steps, ``[R]``.
    """

    grid: ThoughtGrid
    ahead: Tensor
    at_positions: Tensor
    targets: Tensor
    shares: Tensor

    @classmethod
    def of(cls, text: Text, grid: ThoughtGrid, counts: Counts, here: slice = slice(None)) -> TalkRows:
        """The rows of the positions ``here`` of a text, all by default."""
        at_positions = text.talk_targets(grid)[:, here]
        targets = repeat(at_positions, "b n m -> b n r m", r=grid.rationales)
        weights = shares(targets, counts.ahead * grid.rationales * grid.ahead_tokens)
        ahead = grid.ahead_positions(targets.device)[here]
        return cls(grid, ahead, at_positions, targets.flatten(), weights.flatten())

    def mix(self, model: QuietStarModel, base: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed states ``[R, E]`` and weights ``[R]`` from base ``[B, N, E]`` and after ``[B, n, r, m, E]``."""
        first = torch.arange(base.shape[0], device=base.device)[:, None, None] * base.shape[1]
        index = repeat(first + self.ahead, "b n m -> b n r m", r=self.grid.rationales)
        return model.mix(base.flatten(0, 1), after.flatten(0, 3), index.flatten())

    def talk(self, loss: Tensor, log_base: Tensor, log_talk: Tensor, weight: Tensor, policy: Tensor) -> Talk:
        """What was found of the rows."""
        shape = *self.at_positions.shape[:2], self.grid.rationales, self.grid.ahead_tokens
        log_talk, weight = log_talk.view(shape), weight.detach().view(shape)
        return Talk(loss, log_base, self.ahead, log_talk, weight, self.at_positions, policy)


class Base(NamedTuple):
    """A text that was read without thoughts, and scored.

    Attributes:
        hidden: states that predict the next token, ``[B, N, E]``, with gradients.
        kept: keys and values, for the thoughts about it, with gradients.
        loss: ``NLL_base / 2``, with gradients.
        log_base: ``[B, N]``, as of :class:`Talk`.
    """

    hidden: Tensor
    kept: KeptText
    loss: Tensor
    log_base: Tensor


def read_base(model: QuietStarModel, text: Text, grid: ThoughtGrid, counts: Counts) -> Base:
    """Read a text, whose grid is then read in parts (:func:`talk_part`), and score it."""
    model.check_rotary_factors(text.positions, grid.rationale_length)
    with record_function("qstar::talk"):
        kept = KeptText()
        hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start, cache=kept))
        total, log_base = model.language_head().log_prob_sum(
            hidden.flatten(0, 1), text.targets.flatten(), shares(text.targets, counts.text).flatten()
        )
    return Base(hidden, kept, -total / 2, log_base.view(text.tokens.shape))


def talk_part(
    model: QuietStarModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, counts: Counts, base: Base, here: slice
) -> Talk:
    """As :func:`talk`, for the thoughts at the positions ``here``; the losses of all parts and of the base add up.

    Args:
        model: the model.
        text: the whole text, ``[B, N]``.
        grid: the whole grid.
        thoughts: all thoughts, ``[B, N, r, K]`` int64.
        counts: what the means of the loss are taken over.
        base: from :func:`read_base` with the same model, text and grid.
        here: neighbouring positions, with a start and a stop.
    """
    with record_function("qstar::talk"):
        tokens = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
        layout = Part(base.kept, here.stop, grid.rationales, grid.rationale_length, start=text.start)
        positions = grid.position_ids(text.positions)
        policy, after = grid.split_part(model.read(grid.part(tokens, here), grid.part(positions, here), layout))
        rows = TalkRows.of(text, grid, counts, here)
        mixed, weight = rows.mix(model, base.hidden, after)
        total, log_talk = model.language_head().log_prob_sum(mixed, rows.targets, rows.shares)
    return rows.talk(-total / 2, base.log_base, log_talk, weight, policy)


@torch.no_grad()
def speak(model: QuietStarModel, reading: Reading, thoughts: Tensor, *, cached: int = 0) -> Tensor:
    """Read given thoughts to their end token, at the last positions of a text that has been read.

    Args:
        model: the model; thoughts are read in ``eval()``.
        reading: of the text.
        thoughts: ``[B, Nq, r, K]`` int64.
        cached: tokens of these thoughts, the start token among them, that the cache of ``reading`` holds already: K
            after :func:`qstar.thinking.think` with this reading sampled them.

    Returns:
        States that predict the next token, mixed with what each thought leads to, ``[B, Nq, r, E]``.

    Raises:
        ValueError: ``cached`` is not in 0..K + 1.
    """
    edge = torch.full_like(thoughts[..., :1], model.qstar.start_token_id)
    tokens = torch.cat([edge, thoughts, torch.full_like(edge, model.qstar.end_token_id)], dim=-1)
    if not 0 <= cached < tokens.shape[-1]:
        raise ValueError(f"cached is {cached}, but it must be in 0..{tokens.shape[-1] - 1}: the end token is read here")
    with record_function("qstar::talk"), evaluating(model):
        if not cached:
            reading.cache.drop_thoughts()
        for step in range(cached, tokens.shape[-1]):
            after = advance(model, reading, step, tokens[..., step])
        base = reading.hidden[:, -thoughts.shape[1] :]
        index = torch.arange(base.shape[:2].numel(), device=base.device).repeat_interleave(thoughts.shape[2])
        mixed, _ = model.mix(base.flatten(0, 1), after.flatten(0, 2), index)
    return mixed.view_as(after)


def read_batch(
    model: QuietStarModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Text:
    """A batch as :meth:`qstar.grid.Text.from_inputs` takes it; thought tokens in the text are read, never learned."""
    text = Text.from_inputs(input_ids, attention_mask, labels, position_ids)
    said = torch.isin(text.targets, model.qstar_forbidden.to(text.targets.device))
    return replace(text, targets=text.targets.masked_fill(said, IGNORED))


def text_loss(model: QuietStarModel, input_ids: Tensor, count: Tensor | None = None, **batch: Tensor) -> Tensor:
    """Mean negative log-likelihood of a text without thoughts, nats; the batch as :func:`read_batch` takes it.

    ``count`` is the number of tokens ``[]`` that the mean is taken over, those of this batch by default.
    """
    text = read_batch(model, input_ids, **batch)
    count = (text.targets != IGNORED).sum() if count is None else count
    hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start))
    log_prob = model.language_head().log_prob(hidden.flatten(0, 1), text.targets.flatten())
    return -log_prob.sum() / count.clamp(min=1)


def shares(targets: Tensor, count: Tensor) -> Tensor:
    """The weight of each target in a mean over ``count`` of them, ignored ones left out."""
    return (targets != IGNORED).double() / count.clamp(min=1)
