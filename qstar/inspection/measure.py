"""What a model makes of parts of texts: its thoughts there, and every number about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

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
    """Tokens of a text that are read together; several parts may be packed into a row.

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
    """What a model made of a part or of a row of them, on the CPU; 0 where nothing is predicted.

    Attributes:
        targets: ``[N, m]`` int64, ``IGNORED`` where nothing is predicted.
        thoughts: ``[N, r, K]`` int64.
        policy: log-probabilities of their tokens, ``[N, r, K]``; 0 where the model pauses in the place of thinking.
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
def measure(model: QuietStarModel, row: Sequence[Part], settings: InspectionSettings) -> list[Found]:
    """Think at every token of parts, and talk.

    Args:
        model: in ``eval()``.
        row: parts of at least two tokens, each by its ``row_offset`` behind the one before it.
        settings: with a number of rationales.

    Raises:
        FloatingPointError: a log-probability is not finite.
    """
    packed = cast(Found, model(**_batch(model, row), objective=partial(_found, row, settings)))
    return list(map(Found, *(_split(values, row) for values in packed)))


@torch.no_grad()
def gains_of(
    model: QuietStarModel, row: Sequence[Part], thoughts: Sequence[Tensor], max_grid_tokens: int | None = None
) -> list[list[float]]:
    """For each part of a row what other thoughts ``[N, K]`` gain for the next tokens that are predicted, nats."""
    given = torch.cat(list(thoughts))[None, :, None].to(embedding_rows(model).device)

    def spoken(model: QuietStarModel, **batch: Tensor) -> Talk:
        text, grid = read_batch(model, **batch), model.grid(given.shape[1], rationales=1)
        return talk(model, text, grid, given, max_grid_tokens=max_grid_tokens)

    found = cast(Talk, model(**_batch(model, row), objective=spoken))
    gains = found.log_talk[0, :, 0, 0].double() - found.log_base[0].double()
    counted = found.targets[0, :, 0] != IGNORED
    return [here[known].tolist() for here, known in zip(_split(gains, row), _split(counted, row), strict=True)]


def _batch(model: QuietStarModel, row: Sequence[Part]) -> dict[str, Tensor]:
    """Parts as documents that are packed into a row."""
    packed = {
        "input_ids": torch.cat([part.tokens for part in row]),
        "labels": torch.cat([part.labels for part in row]),
        "position_ids": torch.cat([torch.arange(len(part.tokens)) for part in row]),
    }
    return {name: values[None].to(embedding_rows(model).device) for name, values in packed.items()}


def _split(values: Any, row: Sequence[Part]) -> list[Any]:
    """Values ``[N, ...]`` of a row, or tuples of such, by its parts."""
    if isinstance(values, tuple):
        return list(zip(*(_split(each, row) for each in values), strict=True))
    return list(values.split([len(part.tokens) for part in row]))


def _found(row: Sequence[Part], settings: InspectionSettings, model: QuietStarModel, **batch: Tensor) -> Found:
    text = read_batch(model, **batch)
    grid = model.grid(text.tokens.shape[1], rationales=cast(int, settings.rationales))
    thoughts = think(
        model, text, grid, temperature=settings.temperature, seed=settings.seed, row_offset=row[0].row_offset
    )
    states = mixed_states(model, text, grid, thoughts, settings.max_grid_tokens)
    spoken = score_states(model, text, grid, states)
    if not (spoken.log_base.isfinite().all() and spoken.log_talk.isfinite().all()):
        first, last = row[0].document + 1, row[-1].document + 1
        which = f"text {first}" if first == last else f"one of the texts {first} to {last}, which are read together,"
        raise FloatingPointError(f"log-probabilities of {which} are not finite: such a model cannot be inspected")
    head = model.language_head()
    policy, entropy = torch.zeros(thoughts[0].shape), torch.zeros(thoughts[0].shape)
    if not model.qstar.pauses:  # else nothing was sampled
        rows = states.policy[0].flatten(0, 2)
        policy = head.log_prob(rows, thoughts.flatten()).view_as(thoughts[0]).cpu()
        entropy = _entropy(head, rows).view_as(thoughts[0]).cpu()
    ahead = grid.ahead_positions(thoughts.device)
    before, after = (_likeliest(head, each) for each in (states.base[0], states.mixed[0, :, 0, 0]))
    return Found(
        targets=spoken.targets[0].cpu(),
        thoughts=thoughts[0].cpu(),
        policy=policy,
        entropy=entropy,
        base=spoken.log_base[0, ahead].cpu(),
        talk=spoken.log_talk[0].cpu(),
        weight=spoken.weight[0, ..., 0].cpu(),
        advantage=Objective().advantage(spoken, grid)[0].cpu(),
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
