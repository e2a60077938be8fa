"""Read texts with a model's thoughts, and with others in their place, and say of every token what that changed.

The numbers are those of :func:`qstar.evaluation.held_out.evaluate` and of the objective, for the same text and seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import chain
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qstar.config import check_names, setting_names
from qstar.data.documents import text_reader
from qstar.evaluation import controls
from qstar.grid import IGNORED
from qstar.inspection.data import Document, Inspection, Likely, Position, Rationale
from qstar.inspection.measure import Found, Part, gains_of, measure
from qstar.inspection.pieces import Pieces
from qstar.inspection.settings import InspectionSettings
from qstar.inspection.summary import NOTHING, summarize
from qstar.model import QuietStarModel, known_positions
from qstar.thinking import evaluating

VERSIONS = ("quiet-star", "torch", "transformers")


class Tokens(NamedTuple):
    """A text.

    Attributes:
        ids: its tokens.
        labels: the same, ``IGNORED`` in the place of those that are not to be predicted.
    """

    ids: list[int]
    labels: list[int]


def inspect(
    model: QuietStarModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Iterable[str],
    *,
    name: str | None = None,
    **settings: Any,
) -> Inspection:
    """Show what a model thought at each token of texts, how much of it counted, and what it gained.

    A text is read as a document in training is: with the end-of-sequence token behind it, where the tokenizer has one.

    Args:
        model: from :func:`qstar.train`, :func:`qstar.load` or :func:`qstar.wrap`.
        tokenizer: its tokenizer.
        texts: one text or several; intervals are over texts, so that a single one has none.
        name: of the model; that which transformers knows by default.
        settings: any field of :class:`qstar.inspection.settings.InspectionSettings`.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value; a text that is none; there is no token to predict; the model knows
            fewer positions than a part and its thoughts have.
        FloatingPointError: a prediction is not finite.
    """
    check_names("inspect()", settings, setting_names(InspectionSettings))
    chosen = InspectionSettings(**settings)
    documents, cut = tokens_of(tokenizer, [texts] if isinstance(texts, str) else texts, chosen.max_tokens)
    return inspect_tokens(model, tokenizer, documents, chosen, cut=cut, name=name)


def inspect_tokens(
    model: QuietStarModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Tokens],
    settings: InspectionSettings,
    *,
    cut: bool,
    name: str | None = None,
) -> Inspection:
    """:func:`inspect` of texts as tokens, all of them; ``cut`` says whether there was more text.

    Raises:
        ValueError, FloatingPointError: as :func:`inspect`.
    """
    chosen = _resolved(settings, model)
    rows = list(_rows(_parts(documents, chosen), min(chosen.seq_length, _room(model))))
    if not rows:
        raise ValueError(NOTHING)
    pieces = Pieces(tokenizer)
    shown = [Document(tokens=pieces.of_text(each.ids), token_ids=each.ids, positions=[]) for each in documents]
    with evaluating(model):
        found = [each for row in rows for each in measure(model, row, chosen)]
        for part, each in zip(chain(*rows), found, strict=True):
            shown[part.document].positions += _positions(each, part.begin, pieces)
        kept = [number for number, document in enumerate(shown) if document.positions]
        gains = _control_gains(model, tokenizer, rows, found, chosen) if chosen.controls else {}
    return Inspection(
        model=name or str(model.name_or_path) or type(model).__name__,
        thought_tokens=model.qstar.thought_tokens,
        ahead_tokens=model.qstar.ahead_tokens,
        settings=chosen,
        versions={each: version(each) for each in VERSIONS},
        cut=cut,
        documents=[shown[number] for number in kept],
        summary=summarize(
            [shown[number] for number in kept],
            {control: [values.get(number, []) for number in kept] for control, values in gains.items()},
        ),
    )


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], most: int | None) -> tuple[list[Tokens], bool]:
    """Texts as tokens, as many as ``most``, and whether there were more."""
    read = text_reader(tokenizer, "text", None, "texts")
    documents: list[Tokens] = []
    left = most
    for row, text in enumerate(texts):
        for ids, labels in read({"text": [text]}, [row]):
            if left is not None and len(ids) > left:
                return [*documents, Tokens(ids[:left], labels[:left])] if left else documents, True
            documents.append(Tokens(ids, labels))
            left = None if left is None else left - len(ids)
    return documents, False


def _resolved(settings: InspectionSettings, model: QuietStarModel) -> InspectionSettings:
    if settings.rationales is not None:
        return settings
    return replace(settings, rationales=model.qstar.rationales if settings.temperature else 1)


def _parts(documents: Sequence[Tokens], settings: InspectionSettings) -> Iterator[Part]:
    """Documents in parts of at most ``seq_length`` tokens, those of a single token left out."""
    row_offset = 0
    for number, (ids, labels) in enumerate(documents):
        for begin in range(0, len(ids), settings.seq_length):
            here = slice(begin, begin + settings.seq_length)
            part = Part(number, begin, torch.tensor(ids[here]), torch.tensor(labels[here]), row_offset)
            if len(part.tokens) > 1:
                yield part
                row_offset += len(part.tokens) * (settings.rationales or 1)


def _room(model: QuietStarModel) -> float:
    """Tokens of text that a model knows positions of beside those of a thought."""
    known = known_positions(model)
    return inf if known is None else known - model.grid(1).rationale_length


def _rows(parts: Iterable[Part], most: float) -> Iterator[list[Part]]:
    """Parts in their order, as many to a row as have ``most`` tokens: those of short texts are read together."""
    row: list[Part] = []
    for part in parts:
        if row and sum(len(each.tokens) for each in (*row, part)) > most:
            yield row
            row = []
        row.append(part)
    if row:
        yield row


def _positions(found: Found, begin: int, pieces: Pieces) -> Iterator[Position]:
    """Where something is predicted, in a part whose first token is ``begin`` of its document."""
    counted = found.targets != IGNORED
    policy, entropy = found.policy.tolist(), found.entropy.mean(-1).tolist()
    weight, advantage = found.weight.tolist(), found.advantage.tolist()
    for i in counted.any(-1).nonzero()[:, 0].tolist():
        rationales = [
            Rationale(
                tokens=pieces.of_thought(thought),
                token_ids=thought,
                log_probs=policy[i][p],
                entropy=entropy[i][p],
                weight=weight[i][p],
                talk_log_prob=_where(counted[i], found.talk[i, p]),
                advantage=advantage[i][p] if counted[i].all() else None,
            )
            for p, thought in enumerate(found.thoughts[i].tolist())
        ]
        yield Position(
            index=begin + i,
            base_log_prob=_where(counted[i], found.base[i]),
            before=_likely(found.before, i, pieces),
            after=_likely(found.after, i, pieces),
            rationales=rationales,
        )


def _where(counted: Tensor, values: Tensor) -> list[float | None]:
    return [value if known else None for known, value in zip(counted.tolist(), values.tolist(), strict=True)]


def _likely(likeliest: tuple[Tensor, Tensor], row: int, pieces: Pieces) -> list[Likely]:
    tokens, probabilities = (values[row].tolist() for values in likeliest)
    return [Likely(token, pieces.alone(token), p) for token, p in zip(tokens, probabilities, strict=True)]


def _control_gains(
    model: QuietStarModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[Part]],
    found: Sequence[Found],
    settings: InspectionSettings,
) -> dict[str, dict[int, list[float]]]:
    """For each control and document the gains of its next tokens, with one thought at a position."""
    own = [each.thoughts[:, 0] for each in found]
    shapes = [(len(each), model.qstar.thought_tokens) for each in own]
    read = {
        controls.ELSEWHERE: controls.elsewhere(own, settings.seed),
        controls.RANDOM: controls.random_tokens(model, tokenizer, shapes, settings.seed),
        controls.PAUSE: controls.pauses(shapes, controls.pause_token(model, tokenizer)),
    }
    gains: dict[str, dict[int, list[float]]] = {}
    for name, thoughts in read.items():
        by_document, left = gains.setdefault(name, {}), iter(thoughts)
        for row in rows:
            here = [next(left) for _ in row]
            for part, each in zip(row, gains_of(model, row, here, settings.max_grid_tokens), strict=True):
                by_document.setdefault(part.document, []).extend(each)
    return gains
