"""What a model makes of one part of a text: its thoughts there, and every number about them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from qstar.grid import IGNORED
from qstar.heads import LanguageHead
from qstar.inspection.settings import InspectionSettings
from qstar.learning import Objective
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import Talk, mixed_states, read_batch, score_states, talk
from qstar.thinking import think

LIKELIEST = 5
LOGITS = 1 << 24  # at a time: 64 MiB in float32


class Part(NamedTuple):
    """Tokens of a text that are read together.

    Attributes:
        document: number of the text.
        begin: place of the first of the tokens in it.
        tokens: ``[N]`` int64.
        labels: the same, ``IGNORED`` in the place of those that are not to be predicted.
        row_offset: rows (position, rationale) that the parts before have, as :func:`qstar.thinking.think` takes it.
    """

    document: int
    begin: int
    tokens: Tensor
    labels: Tensor
    row_offset: int


class Found(NamedTuple):
    """What a model made of a part, on the CPU; 0 where nothing is predicted.

    Attributes:
        targets: ``[N, m]`` int64, ``IGNORED`` where nothing is predicted.
        thoughts: ``[N, r, K]`` int64.
        policy: log-probabilities of their tokens, ``[N, r, K]``.
        entropy: of the distributions that these were sampled from, ``[N, r, K]``.
        base: log-probabilities of the targets without thoughts, ``[N, m]``.
        talk: after them, ``[N, r, m]``.
        weight: of the thoughts in the prediction of the next token, ``[N, r]``.
        advantage: ``[N, r]``.
        before: the likeliest next tokens without thoughts, and their probabilities, ``[N, 5]`` each.
        after: the same after the first rationale.
    """

    targets: Tensor
    thoughts: Tensor
    policy: Tensor
    entropy: Tensor
    base: Tensor
    talk: Tensor
    weight: Tensor
    advantage: Tensor
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]


@torch.no_grad()
def measure(model: QuietStarModel, part: Part, settings: InspectionSettings) -> Found:
    """Think at every token of a part, and talk.

    Args:
        model: in ``eval()``.
        part: of at least two tokens.
        settings: with a number of rationales.

    Raises:
        FloatingPointError: a log-probability is not finite.
    """
    found = model(**_batch(model, part), objective=partial(_found, part=part, settings=settings))
    return cast(Found, found)


@torch.no_grad()
def gains_of(model: QuietStarModel, part: Part, thoughts: Tensor, max_grid_tokens: int | None = None) -> list[float]:
    """What other thoughts ``[N, K]`` gain for the next tokens that are predicted, nats."""
    given = thoughts[None, :, None].to(embedding_rows(model).device)

    def spoken(model: QuietStarModel, **batch: Tensor) -> Talk:
        text, grid = read_batch(model, **batch), model.grid(len(part.tokens), rationales=1)
        return talk(model, text, grid, given, max_grid_tokens=max_grid_tokens)

    found = cast(Talk, model(**_batch(model, part), objective=spoken))
    gains = found.log_talk[0, :, 0, 0].double() - found.log_base[0].double()
    return cast(list[float], gains[found.targets[0, :, 0] != IGNORED].tolist())


def _batch(model: QuietStarModel, part: Part) -> dict[str, Tensor]:
    device = embedding_rows(model).device
    return {"input_ids": part.tokens[None].to(device), "labels": part.labels[None].to(device)}


def _found(model: QuietStarModel, *, part: Part, settings: InspectionSettings, **batch: Tensor) -> Found:
    text = read_batch(model, **batch)
    grid = model.grid(len(part.tokens), rationales=cast(int, settings.rationales))
    thoughts = think(
        model, text, grid, temperature=settings.temperature, seed=settings.seed, row_offset=part.row_offset
    )
    states = mixed_states(model, text, grid, thoughts, settings.max_grid_tokens)
    spoken = score_states(model, text, grid, states)
    if not all(values.isfinite().all() for values in (spoken.log_base, spoken.log_talk)):
        raise FloatingPointError(
            f"log-probabilities of text {part.document + 1} are not finite: such a model cannot be inspected"
        )
    head = model.language_head()
    policy = states.policy[0].flatten(0, 2)
    ahead = grid.ahead_positions(policy.device)
    before, after = (_likeliest(head, each) for each in (states.base[0], states.mixed[0, :, 0, 0]))
    return Found(
        targets=spoken.targets[0].cpu(),
        thoughts=thoughts[0].cpu(),
        policy=head.log_prob(policy, thoughts.flatten()).view_as(thoughts[0]).cpu(),
        entropy=_entropy(head, policy).view_as(thoughts[0]).cpu(),
        base=spoken.log_base[0, ahead].cpu(),
        talk=spoken.log_talk[0].cpu(),
        weight=spoken.weight[0, ..., 0].cpu(),
        advantage=Objective(signed=True).advantage(spoken, grid)[0].cpu(),
        before=before,
        after=after,
    )


def _log_probs(head: LanguageHead, states: Tensor) -> Iterator[Tensor]:
    """Log-probabilities of all tokens at states ``[R, E]``, some rows after the other."""
    for rows in states.split(max(LOGITS // len(head.weight), 1)):
        yield head.logits(rows).log_softmax(-1)


def _entropy(head: LanguageHead, states: Tensor) -> Tensor:
    """Of the next token at states ``[R, E]``, nats."""
    return torch.cat([torch.special.entr(log_p.exp()).sum(-1) for log_p in _log_probs(head, states)])


def _likeliest(head: LanguageHead, states: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest tokens at states ``[R, E]`` and their probabilities, ``[R, 5]`` each."""
    count = min(LIKELIEST, len(head.weight) - len(head.forbidden))
    found = [log_p.topk(count) for log_p in _log_probs(head, states)]
    return torch.cat([each.indices for each in found]).cpu(), torch.cat([each.values for each in found]).exp().cpu()
