"""Two models beside each other, by what they made of the same tokens.

A gain is over what the same model predicts without thoughts: one whose predictions are worse without them may gain
more. Which of two models predicts better is told by the log-probability after thoughts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from statistics import fmean
from typing import NamedTuple, cast

from qstar.inspection.data import DifficultyGain, Document, Estimate, Inspection, Position, Saved, Summary
from qstar.inspection.highlights import ahead_name, difficulty_name, outermost
from qstar.inspection.summary import NOTHING, estimate, is_right

SIDES = ("first", "second")  # what the models are called where both are shown


@dataclass(kw_only=True)
class Difference:
    """A value of two models, over the next tokens that both predict.

    Attributes:
        first: mean of the first model, nats.
        second: of the second.
        difference: of the second's value less the first's, token by token.
    """

    first: float
    second: float
    difference: Estimate


@dataclass(kw_only=True)
class Comparison(Saved):
    """What two models thought about the same texts, and which of them that served better.

    Attributes:
        first: what was found of one model.
        second: of the other.
        tokens: next tokens that both predict: all differences are of these.
        talk_log_prob: of them after thoughts.
        base_log_prob: without thoughts.
        gain: of thoughts.
        repaired: next tokens that were the likeliest one after the first rationale of the second model, but not after
            that of the first.
        broken: the other way round.
    """

    _called = "a comparison"

    first: Inspection
    second: Inspection
    tokens: int
    talk_log_prob: Difference
    base_log_prob: Difference
    gain: Difference
    repaired: int
    broken: int


class Pair(NamedTuple):
    """Where both models predict the next token.

    Attributes:
        number: of the document, from 0.
        document: the first model's.
        first: position of the first model in it.
        second: the same of the second.
    """

    number: int
    document: Document
    first: Position
    second: Position

    @property
    def base_log_prob(self) -> float:
        """Difference of the next token's log-probabilities without thoughts: the second's less the first's."""
        return _next(self.second.base_log_prob) - _next(self.first.base_log_prob)

    @property
    def talk_log_prob(self) -> float:
        """The same after thoughts."""
        return _next(self.second.talk_log_prob) - _next(self.first.talk_log_prob)

    @property
    def gain(self) -> float:
        """Difference of what thoughts gained for the next token."""
        return _next(self.second.gain_ahead) - _next(self.first.gain_ahead)


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Two inspections of the same texts beside each other.

    The models may differ in everything but how they cut a text into tokens; thoughts may be of other lengths, and
    scored on other numbers of tokens ahead, since what is compared is the next token.

    Args:
        first: what :func:`qstar.inspect` has found of one model, or :meth:`Inspection.from_json` read.
        second: of the other: differences are its values less those of ``first``.

    Raises:
        ValueError: the texts are not the same tokens, or were read in parts of other lengths; there is no token that
            both predict.
    """
    lengths = first.settings.seq_length, second.settings.seq_length
    if lengths[0] != lengths[1]:
        raise ValueError(f"seq_length is {lengths[0]} of the first and {lengths[1]} of the second: it must be the same")
    check_same_tokens([_read(each) for each in first.documents], [_read(each) for each in second.documents])
    pairs = paired(first, second)
    if not any(pairs):
        raise ValueError(NOTHING)
    right = [
        (is_right(pair.first, pair.document)[1], is_right(pair.second, pair.document)[1])
        for some in pairs
        for pair in some
    ]
    return Comparison(
        first=first,
        second=second,
        tokens=len(right),
        talk_log_prob=_difference(pairs, lambda each: _next(each.talk_log_prob)),
        base_log_prob=_difference(pairs, lambda each: _next(each.base_log_prob)),
        gain=_difference(pairs, lambda each: _next(each.gain_ahead)),
        repaired=right.count((False, True)),
        broken=right.count((True, False)),
    )


def check_same_tokens(first: Sequence[Sequence[object]], second: Sequence[Sequence[object]]) -> None:
    """Raise ValueError where texts, which are tokens, are not the same to two models."""
    for number, (ours, theirs) in enumerate(zip_longest(first, second, fillvalue=()), 1):
        for place, (one, other) in enumerate(zip_longest(ours, theirs), 1):
            if one != other:
                raise ValueError(
                    f"text {number} is not the same tokens to both models, from token {place} on: only models that cut "
                    "a text alike can be compared"
                )


def paired(first: Inspection, second: Inspection) -> list[list[Pair]]:
    """By document, where both models predict the next token, in the order of the text."""
    found = []
    for number, (document, other) in enumerate(zip(first.documents, second.documents, strict=True)):
        known = {each.index: each for each in other.positions if each.gain is not None}
        here = [each for each in document.positions if each.gain is not None and each.index in known]
        found.append([Pair(number, document, each, known[each.index]) for each in here])
    return found


def largest_differences(comparison: Comparison, count: int) -> tuple[list[Pair], list[Pair]]:
    """The ``count`` next tokens that the second model predicts better after thoughts by most, and worse by most.

    By the difference of their log-probabilities, the largest first; equal ones as in the text.
    """
    pairs = [pair for some in paired(comparison.first, comparison.second) for pair in some]
    return outermost([(pair.talk_log_prob, pair) for pair in pairs], count)


def gains_beside(first: Summary, second: Summary) -> list[tuple[str, Estimate | None, Estimate | None]]:
    """What two models gained over no thought, by name; None where one of them was not asked."""
    ahead = enumerate(zip_longest(first.gain_ahead, second.gain_ahead), 1)
    rows = [(f"its thoughts, {ahead_name(number)}", *both) for number, both in ahead if any(both)]
    for name in dict.fromkeys([*first.controls, *second.controls]):
        one, other = (each.controls.get(name) for each in (first, second))
        rows.append((name, one and one.gain, other and other.gain))
    return rows


def difficulties_beside(
    first: Summary, second: Summary
) -> list[tuple[str, DifficultyGain | None, DifficultyGain | None]]:
    """The gains of two models by how hard a next token is for each of them itself, by name."""
    one, other = ({each.least: each for each in summary.difficulties} for summary in (first, second))
    names = {least: difficulty_name(each) for least, each in (one | other).items()}
    return [(names[least], one.get(least), other.get(least)) for least in sorted(names)]


def _read(document: Document) -> list[tuple[int, str]]:
    return list(zip(document.token_ids, document.tokens, strict=True))


def _difference(pairs: Sequence[Sequence[Pair]], value: Callable[[Position], float]) -> Difference:
    first = [[value(pair.first) for pair in some] for some in pairs]
    second = [[value(pair.second) for pair in some] for some in pairs]
    differences = [[other - one for one, other in zip(*both, strict=True)] for both in zip(first, second, strict=True)]
    return Difference(
        first=fmean(chain.from_iterable(first)),
        second=fmean(chain.from_iterable(second)),
        difference=estimate(differences),
    )


def _next(values: Sequence[float | None]) -> float:
    """That of the next token, which :func:`paired` knows to be predicted."""
    return cast(float, values[0])
