"""What an inspection found, as plain data: what every view shows, and what a file holds.

All log-probabilities are in nats. Of the m tokens ahead of a thought, some may not be predicted, at the end of a text
or of a part of it; their values are None.
"""

from __future__ import annotations

import functools
import json
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, Self, Union, cast, get_args, get_origin, get_type_hints

from qstar.inspection.settings import InspectionSettings

SCHEMA = 1
_hints: Any = functools.cache(get_type_hints)


class Saved:
    """A dataclass that a file can hold."""

    _called: ClassVar[str]  # what errors call it

    def to_json(self) -> str:
        """All of it, with the number of the schema, as one line of ASCII."""
        return json.dumps({"schema": SCHEMA, **asdict(cast(Any, self))}, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What :meth:`to_json` wrote, number for number.

        Raises:
            ValueError: it is none, or of another schema.
        """
        article, name = cls._called.split()
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not the JSON of {article} {name}: {error}") from None
        if not isinstance(values, dict) or "schema" not in values:
            raise ValueError(f"this is not the JSON of {article} {name}: it has no schema")
        if values.pop("schema") != SCHEMA:
            raise ValueError(f"the {name} is of another schema, but it must be {SCHEMA}: inspect again")
        return cast(Self, _read(cls, values, name))


class Likely(NamedTuple):
    """One of the likeliest next tokens, with its probability."""

    token_id: int
    text: str
    probability: float


@dataclass(kw_only=True)
class Rationale:
    """One thought at a position.

    Attributes:
        tokens: text of the K sampled tokens; ``""`` for a token that ends within a character.
        token_ids: of them.
        log_probs: of them, where they were sampled, at temperature 1; 0 of pauses, which nothing samples.
        entropy: of the distributions that they were sampled from, at temperature 1: the mean over them, nats.
        weight: of the thought in the prediction of the next token.
        talk_log_prob: of the m tokens ahead, after the thought.
        advantage: how much better the m tokens ahead fared than after the other rationales, or with a single one than
            without a thought, nats; None where not all of them are predicted.
    """

    tokens: list[str]
    token_ids: list[int]
    log_probs: list[float]
    entropy: float
    weight: float
    talk_log_prob: list[float | None]
    advantage: float | None


@dataclass(kw_only=True)
class Position:
    """Where a thought stands: behind a token of the text, before the next.

    Attributes:
        index: of the last token before the thought, in its document.
        base_log_prob: of the m tokens ahead, without a thought.
        before: the five likeliest next tokens without a thought.
        after: the same after the first rationale.
        rationales: the thoughts.
    """

    index: int
    base_log_prob: list[float | None]
    before: list[Likely]
    after: list[Likely]
    rationales: list[Rationale]

    @property
    def talk_log_prob(self) -> list[float | None]:
        """Of the m tokens ahead after a thought, the mean over the rationales."""
        return [_mean_or_none(values) for values in zip(*(each.talk_log_prob for each in self.rationales), strict=True)]

    @property
    def gain(self) -> float | None:
        """What the thoughts gained for the next token."""
        return self.gain_ahead[0]

    @property
    def gain_ahead(self) -> list[float | None]:
        """For the m tokens ahead: ``talk_log_prob - base_log_prob``."""
        pairs = zip(self.talk_log_prob, self.base_log_prob, strict=True)
        return [None if talk is None or base is None else talk - base for talk, base in pairs]

    @property
    def own_gains(self) -> list[float | None]:
        """What each of the rationales gained for the next token."""
        base = self.base_log_prob[0]
        talks = [each.talk_log_prob[0] for each in self.rationales]
        return [None if talk is None or base is None else talk - base for talk in talks]

    @property
    def surprise(self) -> float | None:
        """How hard the next token is without a thought: its negative log-likelihood."""
        return None if self.base_log_prob[0] is None else -self.base_log_prob[0]

    @property
    def weight(self) -> float:
        """Mean over the rationales."""
        return fmean(each.weight for each in self.rationales)


@dataclass(kw_only=True)
class Document:
    """A text.

    Attributes:
        tokens: text of each token; ``""`` for one that ends within a character, which the token that ends it holds.
        token_ids: of them.
        positions: where something is predicted, by ``index``.
    """

    tokens: list[str]
    token_ids: list[int]
    positions: list[Position]


@dataclass(kw_only=True)
class Estimate:
    """A mean over tokens, with its 95 % interval over documents; None where there are too few of them."""

    mean: float
    low: float | None
    high: float | None


@dataclass(kw_only=True)
class Control:
    """What was read in the place of the model's own thoughts.

    Attributes:
        gain: for the next token, as of a thought.
        lead: of the model's own thoughts: their gain less this one's, token by token.
    """

    gain: Estimate
    lead: Estimate


@dataclass(kw_only=True)
class Frequent:
    """A thought, and how often it was thought."""

    tokens: list[str]
    count: int


@dataclass(kw_only=True)
class DifficultyGain:
    """Next tokens that are about as hard to predict without thoughts.

    Attributes:
        least: of the negative log-likelihood without thoughts, of all tokens in here.
        below: that it is below; None for the hardest.
        tokens: how many there are.
        base_log_prob: mean without thoughts.
        gain: by thoughts.
    """

    least: float
    below: float | None
    tokens: int
    base_log_prob: float
    gain: Estimate


@dataclass(kw_only=True)
class Summary:
    """All positions together.

    Attributes:
        documents: how many there are.
        tokens: next tokens that are predicted.
        base_log_prob: mean of them without thoughts.
        gain: for the next token.
        gain_ahead: for each of the m tokens ahead; None for one that no text is long enough for.
        weight: mean of the thoughts.
        entropy: mean of the thoughts, nats a token.
        thoughts: how many there are.
        distinct: share of them that differ from each other.
        frequent: the most frequent ones.
        repaired: next tokens that were the likeliest one after the first rationale and not without.
        broken: the other way round.
        difficulties: the gain by how hard a next token is.
        controls: by name; no thought gains 0 by definition, and is not among them.
    """

    documents: int
    tokens: int
    base_log_prob: float
    gain: Estimate
    gain_ahead: list[Estimate | None]
    weight: float
    entropy: float
    thoughts: int
    distinct: float
    frequent: list[Frequent]
    repaired: int
    broken: int
    difficulties: list[DifficultyGain]
    controls: dict[str, Control]


@dataclass(kw_only=True)
class Inspection(Saved):
    """What a model thought about texts, and what it gained.

    Attributes:
        model: its name.
        thought_tokens: K, sampled tokens in a thought.
        ahead_tokens: m, text tokens that a thought is scored on.
        settings: of the inspection.
        versions: of the packages that decide about the numbers.
        cut: whether there was more text than ``settings.max_tokens``.
        documents: the texts, those without a token to predict left out.
        summary: of all of them.
    """

    _called = "an inspection"

    model: str
    thought_tokens: int
    ahead_tokens: int
    settings: InspectionSettings
    versions: dict[str, str]
    cut: bool
    documents: list[Document]
    summary: Summary


def _mean_or_none(values: tuple[float | None, ...]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _read(kind: Any, value: Any, place: str) -> Any:
    """``value`` of JSON as what a type hint says; ``place`` is what errors call it."""
    if get_origin(kind) in (Union, types.UnionType):
        [plain] = [each for each in get_args(kind) if each is not type(None)]
        return None if value is None else _read(plain, value, place)
    if get_origin(kind) is list:
        of = get_args(kind)[0]
        return [_read(of, each, f"{place}[{i}]") for i, each in enumerate(_checked(list, value, place))]
    if get_origin(kind) is dict:
        of = get_args(kind)[1]
        return {name: _read(of, each, f"{place}.{name}") for name, each in _checked(dict, value, place).items()}
    if issubclass(kind, tuple):
        hints, values = _hints(kind), _checked(list, value, place)
        if len(values) != len(hints):
            raise ValueError(f"{place} has {len(values)} values, but it must have {len(hints)}")
        return kind(
            *(_read(of, each, f"{place}.{name}") for (name, of), each in zip(hints.items(), values, strict=True))
        )
    if is_dataclass(kind):
        hints, values = _hints(kind), _checked(dict, value, place)
        names = [each.name for each in fields(kind)]
        if values.keys() != set(names):
            wrong = sorted(values.keys() ^ set(names))
            raise ValueError(f"{place} lacks or has too much: {', '.join(wrong)}; it must have {', '.join(names)}")
        return cast(Any, kind)(**{name: _read(hints[name], values[name], f"{place}.{name}") for name in names})
    return _checked(kind, value, place)


def _checked(kind: type, value: Any, place: str) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{place} is a {type(value).__name__}, but it must be a {kind.__name__}")
    return value
