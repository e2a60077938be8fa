"""Talk, the second of the paper's three steps: predict the text after a thought, mixed with the prediction without.

In training all text and all thoughts are one packed pass, or some (:func:`read_apart`); where a model answers, a
thought is read token by token into the cache of the text (:func:`speak`). ``learning.py`` goes on from here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from qstar.cache import KeptText
from qstar.grid import IGNORED, Counts, Text, ThoughtGrid
from qstar.layouts import Packed, Part
from qstar.model import QuietStarModel
from qstar.thinking import Reading, advance, evaluating
from qstar_kernels import cpu_products, current_cpu_products


@dataclass
class Talk:
    """Log-probabilities of the text, fp32 nats; 0 where there is nothing to predict.

    Attributes:
        loss: ``(NLL_base + NLL_talk) / 2``; of all this it alone and ``policy`` carry gradients.
        log_base: without thoughts, ``[B, N]``.
        log_talk: of ``x_{i+k+1}`` after the thought at ``i``, ``[B, n, r, m]``.
        weight: of the thought in the mix, ``[B, n, r, m]``.
        targets: what ``log_talk`` scores, ``[B, n, m]`` int64, ``IGNORED`` where nothing.
        policy: states that predict the sampled tokens, ``[B, n, r, K, E]``.
    """

    loss: Tensor
    log_base: Tensor
    log_talk: Tensor
    weight: Tensor
    targets: Tensor
    policy: Tensor


class MixedStates(NamedTuple):
    """States that the output head predicts from.

    Attributes:
        base: of the text, ``[B, N, E]``.
        policy: that predict the sampled tokens, ``[B, n, r, K, E]``.
        mixed: that predict ``x_{i+k+1}`` after the thought at ``i``, ``[B, n, r, m, E]``, at least fp32.
        weight: of the thought in them, ``[B, n, r, m]``.
    """

    base: Tensor
    policy: Tensor
    mixed: Tensor
    weight: Tensor


def read_grid(
    model: QuietStarModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, max_tokens: int | None = None
) -> Tensor:
    """Hidden states ``[B, N*C, E]`` of text and thoughts ``[B, N, r, K]`` at all positions.

    All in one packed pass, unless it has more than ``max_tokens`` tokens: then as :func:`read_apart` does.
    """
    if max_tokens is None or len(text.tokens) * grid.row_tokens() <= max_tokens:
        model.check_rotary_factors(text.positions, grid.rationale_length)
        tokens = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
        layout = Packed(grid.slots, grid.rationales, start=text.start)
        return model.read(tokens, grid.position_ids(text.positions), layout)
    base, after = read_apart(model, text, grid, thoughts, max_tokens)
    return torch.cat([base[:, :, None], after], dim=2).flatten(1, 2)


def read_apart(
    model: QuietStarModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, max_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states of the text ``[B, N, E]`` and of thoughts ``[B, n, r, K]`` about it, ``[B, n, r*T, E]``.

    The text is read by itself, and then all thoughts, unless they and the text have more than ``max_tokens`` tokens:
    then those at some positions after the other. Their activations do not stay: each part is computed once more for
    its gradients, so that memory holds the text's and those of one part.
    """
    model.check_rotary_factors(text.positions, grid.rationale_length)
    tokens = grid.rationale_tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    positions = grid.rationale_position_ids(text.positions)
    kept, count = KeptText(), grid.thought_positions
    base = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start, cache=kept))

    def read_part(begin: int) -> Tensor:
        here = slice(begin, min(begin + size, count))
        stop, at = (here.stop, None) if grid.chosen is None else (grid.positions, grid.chosen[:, here])
        layout = Part(kept, stop, grid.rationales, grid.rationale_length, start=text.start, at=at)
        with cpu_products(library):
            return model.read(tokens[:, here].flatten(1), positions[:, here].flatten(1), layout)

    library = current_cpu_products()  # the backward must compute a part as the forward did
    if max_tokens is None or len(tokens) * grid.row_tokens(count) <= max_tokens:
        size = count
        parts = [read_part(0)]
    else:
        size = max(max_tokens // (len(tokens) * (grid.slots - 1)), 1)
        parts = [checkpoint(read_part, begin, use_reentrant=False) for begin in range(0, count, size)]
    return base, rearrange(torch.cat(parts, dim=1), "b (n s) e -> b n s e", n=count)


def mixed_states(
    model: QuietStarModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, max_grid_tokens: int | None = None
) -> MixedStates:
    """Read the text and thoughts ``[B, n, r, K]``, and mix what each thought leads to; the rest as :func:`talk`."""
    if grid.chosen is None:
        base, policy, after = grid.split(read_grid(model, text, grid, thoughts, max_grid_tokens))
    else:
        base, rationales = read_apart(model, text, grid, thoughts, max_grid_tokens)
        policy, after = grid.split_rationales(rationales)
    batch, positions = text.tokens.shape
    row = torch.arange(batch, device=base.device)[:, None, None] * positions
    base_index = repeat(row + grid.ahead_positions(base.device), "b n m -> b n r m", r=grid.rationales)
    mixed, weight = model.mix(base.flatten(0, 1), after.flatten(0, 3), base_index.flatten())
    return MixedStates(base, policy, mixed.unflatten(0, base_index.shape), weight.view_as(base_index))


def talk(
    model: QuietStarModel,
    text: Text,
    grid: ThoughtGrid,
    thoughts: Tensor,
    counts: Counts | None = None,
    max_grid_tokens: int | None = None,
) -> Talk:
    """Score the text with and without thoughts (paper, section 4.3).

    Args:
        model: the model.
        text: the text, ``[B, N]``.
        grid: how many rationales of how many tokens, and where.
        thoughts: the thoughts to read, ``[B, n, r, K]`` int64.
        counts: what the means of the loss are taken over; over this batch by default.
        max_grid_tokens: how much is read at once, see :func:`read_apart`; all by default.
    """
    with record_function("qstar::talk"):
        return score_states(model, text, grid, mixed_states(model, text, grid, thoughts, max_grid_tokens), counts)


def score_states(
    model: QuietStarModel, text: Text, grid: ThoughtGrid, states: MixedStates, counts: Counts | None = None
) -> Talk:
    """What ``states`` make of the text; the rest as :func:`talk`, which this is the second half of."""
    counts = text.counts(grid) if counts is None else counts
    targets = text.talk_targets(grid)
    base, mixed = states.base.flatten(0, 1), states.mixed.flatten(0, 3)
    talk_targets = repeat(targets, "b n m -> b n r m", r=grid.rationales)
    talk_counts = counts.ahead * grid.rationales * grid.ahead_tokens
    total, log_prob = model.language_head().log_prob_sum(
        torch.cat([base.to(mixed.dtype), mixed]),
        torch.cat([text.targets.flatten(), talk_targets.flatten()]),
        torch.cat([shares(text.targets, counts.text).flatten(), shares(talk_targets, talk_counts).flatten()]),
    )
    log_base, log_talk = log_prob.split([len(base), len(mixed)])
    return Talk(
        loss=-total / 2,
        log_base=log_base.view(text.tokens.shape),
        log_talk=log_talk.view_as(talk_targets),
        weight=states.weight.detach(),
        targets=targets,
        policy=states.policy,
    )


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
    return -text_log_prob(model, text).sum() / count.clamp(min=1)


def text_log_prob(model: QuietStarModel, text: Text) -> Tensor:
    """Log-probability of each next token of a text without thoughts, ``[B, N]`` nats; 0 where there is none."""
    hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start))
    return model.language_head().log_prob(hidden.flatten(0, 1), text.targets.flatten()).view_as(text.targets)


def shares(targets: Tensor, count: Tensor) -> Tensor:
    """The weight of each target in a mean over ``count`` of them, ignored ones left out."""
    return (targets != IGNORED).double() / count.clamp(min=1)
