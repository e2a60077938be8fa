"""What all positions of an inspection say together."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isinf, isnan
from statistics import fmean

from qstar.evaluation.held_out import DIFFICULTIES
from qstar.evaluation.intervals import bootstrap
from qstar.inspection.data import Control, DifficultyGain, Document, Estimate, Frequent, Position, Summary

FREQUENT = 10  # thoughts that are listed
NOTHING = "texts hold no token to predict"


def summarize(documents: Sequence[Document], controls: Mapping[str, Sequence[Sequence[float]]]) -> Summary:
    """The summary of documents.

    Args:
        documents: with what is predicted in them.
        controls: by name, for each document the gains of its next tokens that are predicted, nats.

    Raises:
        ValueError: no next token is predicted.
    """
    predicted = [[each for each in document.positions if each.gain is not None] for document in documents]
    positions = [each for some in predicted for each in some]
    if not positions:
        raise ValueError(NOTHING)
    ahead = len(positions[0].base_log_prob)
    gains = [
        [_known(each.gain_ahead[k] for each in document.positions) for document in documents] for k in range(ahead)
    ]
    rationales = [each for position in positions for each in position.rationales]
    counts = Counter(tuple(each.token_ids) for each in rationales)
    texts = {tuple(each.token_ids): each.tokens for each in rationales}
    changes = Counter(
        is_right(each, document) for document, some in zip(documents, predicted, strict=True) for each in some
    )
    return Summary(
        documents=len(documents),
        tokens=len(positions),
        base_log_prob=-fmean(_known(each.surprise for each in positions)),
        gain=estimate(gains[0]),
        gain_ahead=[estimate(values) if any(values) else None for values in gains],
        weight=fmean(each.weight for each in rationales),
        entropy=fmean(each.entropy for each in rationales),
        thoughts=len(rationales),
        distinct=len(counts) / len(rationales),
        frequent=[Frequent(tokens=texts[ids], count=count) for ids, count in counts.most_common(FREQUENT)],
        repaired=changes[False, True],
        broken=changes[True, False],
        difficulties=_difficulties(predicted),
        controls={name: _control(values, gains[0]) for name, values in controls.items()},
    )


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values, which come by document; there must be one."""
    sums, counts = [sum(each) for each in values], [len(each) for each in values]
    low, high = (None if isnan(bound) else bound for bound in bootstrap(sums, counts=counts))
    return Estimate(mean=sum(sums) / sum(counts), low=low, high=high)


def is_right(position: Position, document: Document) -> tuple[bool, bool]:
    """Whether the next token is the likeliest one without a thought, and after the first rationale."""
    token = document.token_ids[position.index + 1]
    return position.before[0].token_id == token, position.after[0].token_id == token


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _difficulties(predicted: Sequence[Sequence[Position]]) -> list[DifficultyGain]:
    """The gain by how hard a next token is, where there are tokens; positions come by document."""
    found = []
    for number, (least, below) in enumerate(pairwise(DIFFICULTIES)):
        here = [
            [each for each in some if each.surprise is not None and _bin_of(each.surprise) == number]
            for some in predicted
        ]
        surprises = _known(each.surprise for some in here for each in some)
        if surprises:
            found.append(
                DifficultyGain(
                    least=least,
                    below=None if isinf(below) else below,
                    tokens=len(surprises),
                    base_log_prob=-fmean(surprises),
                    gain=estimate([_known(each.gain for each in some) for some in here]),
                )
            )
    return found


def _bin_of(surprise: float) -> int:
    return bisect_right(DIFFICULTIES[1:-1], surprise)


def _control(gains: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> Control:
    leads = [[mine - its for mine, its in zip(*pair, strict=True)] for pair in zip(own, gains, strict=True)]
    return Control(gain=estimate(gains), lead=estimate(leads))
