"""Kinds of answers: how each is written in a data set, which tokens it may have, and how it is read out of a text.

The words "strict" and "flexible" are those of lm-evaluation-harness, and so are the patterns of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from string import ascii_uppercase
from typing import Any, NamedTuple, Protocol

ANNOUNCED = r"[Tt]he answer is:?\s*"
MARK = "####"  # what stands before the answer in GSM8K
MINUSES = str.maketrans("−–", "--")  # the sign of mathematics, and the dash that stands in for it
FOUND_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")
STRICT_NUMBER = re.compile(rf"(?:{ANNOUNCED}|{MARK}\s*)(-?\$?-?[0-9.,]+)")
PLAIN_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)", re.ASCII)


class Reading(NamedTuple):
    """An answer that was read out of a text.

    Attributes:
        said: the answer in the form in which answers are compared; None where none was found.
        by: ``"strict"`` where the text announces it, ``"flexible"`` where it was looked for, ``"first"`` where the text
            begins with it; None where none was found.
    """

    said: str | None
    by: str | None


NOTHING = Reading(None, None)


class Answers(Protocol):
    """A kind of answers."""

    @property
    def wanted(self) -> str:
        """What an answer must be, for errors."""

    @property
    def asked(self) -> str:
        """What stands behind reasoning that did not come to its answer."""

    @property
    def permits(self) -> Callable[[str], bool] | None:
        """Whether the text of a token may be a part of an answer; None where any may."""

    def written(self, value: Any) -> str | None:
        """A data set's value as it is written in a prompt; None where it is no answer of this kind."""

    def normalised(self, text: str) -> str | None:
        """The form in which answers are compared; None where it is no answer of this kind."""

    def read(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """The answer that a reasoning comes to, of ``choices`` where there are some."""

    def first(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """The first answer in a text."""


def normalised_number(text: str) -> str | None:
    """A number as ``-1234.5``: without ``$``, commas, periods at its end or zeros behind the point.

    None where it is no number.
    """
    plain = re.sub(r"[$,\s]", "", text.translate(MINUSES)).rstrip(".")
    if not PLAIN_NUMBER.fullmatch(plain):
        return None
    whole, _, part = plain.lstrip("+-").partition(".")
    whole, part = whole.lstrip("0") or "0", part.rstrip("0")
    number = f"{whole}.{part}" if part else whole
    return f"-{number}" if plain.startswith("-") and number != "0" else number


@dataclass(frozen=True)
class Numbers:
    """Answers that are numbers."""

    wanted = "a number"
    asked = "Therefore, the answer (arabic numerals) is"

    @staticmethod
    def permits(text: str) -> bool:
        """Whether a token is digits alone."""
        return text.isascii() and text.isdigit()

    def written(self, value: Any) -> str | None:
        """A number as the data set writes it, but for ``.0`` behind a whole one."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None
        text = str(value).strip()
        if "e" in text.lower() and isinstance(value, float):
            text = format(Decimal(text), "f")
        return None if normalised_number(text) is None else re.sub(r"\.0*$", "", text)

    def normalised(self, text: str) -> str | None:
        """See :func:`normalised_number`."""
        return normalised_number(text)

    def read(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """The first number behind ``The answer is`` or ``####``, else the last number of all.

        Where the last match of the pattern is no number (``...``), one before it is read.
        """
        text = text.translate(MINUSES)
        for by, found in (
            ("strict", STRICT_NUMBER.findall(text)[:1]),
            ("flexible", reversed(FOUND_NUMBER.findall(text))),
        ):
            for each in found:
                if (number := normalised_number(each)) is not None:
                    return Reading(number, by)
        return NOTHING

    def first(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """The first number."""
        numbers = map(normalised_number, FOUND_NUMBER.findall(text.translate(MINUSES)))
        number = next((each for each in numbers if each is not None), None)
        return NOTHING if number is None else Reading(number, "first")


@dataclass(frozen=True)
class Letters:
    """Answers that are letters of choices.

    Attributes:
        count: choices that a question may have.
    """

    count: int = 5

    def __post_init__(self) -> None:
        if not 2 <= self.count <= len(ascii_uppercase):
            raise ValueError(f"count is {self.count}, but there must be 2 to {len(ascii_uppercase)} choices")

    @property
    def labels(self) -> tuple[str, ...]:
        """The letters from A on."""
        return tuple(ascii_uppercase[: self.count])

    @property
    def wanted(self) -> str:
        """See :class:`Answers`."""
        return f"one of the letters {', '.join(self.labels)}"

    @property
    def asked(self) -> str:
        """The words of Kojima et al. (2022)."""
        return f"Therefore, among A through {self.labels[-1]}, the answer is"

    def permits(self, text: str) -> bool:
        """Whether a token is one of the letters."""
        return text in self.labels

    def written(self, value: Any) -> str | None:
        """A letter as it is."""
        return self.normalised(value) if isinstance(value, str) else None

    def normalised(self, text: str) -> str | None:
        """A letter without parentheses or a period."""
        found = re.fullmatch(r"\s*\(?([A-Z])\)?[.:]?\s*", text)
        return found[1] if found and found[1] in self.labels else None

    def read(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """What follows ``The answer is``, a letter or the text of a choice; else the last answer in the text.

        That is the last letter in parentheses, else the last that stands for itself (a letter before a word is taken
        for an article), else the choice that is named last.
        """
        labels = self._labels(choices)
        for found in re.finditer(ANNOUNCED, text):
            said = self._leading(text[found.end() :], choices)
            if said is not None:
                return Reading(said, "strict")
        for pattern in (rf"\(([{labels}])\)", rf"(?<![\w'’-])([{labels}])(?=\s*(?:[.,:;)!?]|$))"):
            if letters := re.findall(pattern, text, re.MULTILINE):
                return Reading(letters[-1], "flexible")
        return self._named(text, choices, last=True, by="flexible")

    def first(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """The letter or the choice that a text begins with; else the first letter that stands for itself."""
        said = self._leading(text.lstrip(), choices)
        if said is None and (found := re.search(rf"(?<![\w'’-])([{self._labels(choices)}])\b(?!['’-])", text)):
            said = found[1]
        return self._named(text, choices, last=False, by="first") if said is None else Reading(said, "first")

    def _labels(self, choices: Sequence[str]) -> str:
        return "".join(self.labels[: len(choices) or None])

    def _leading(self, text: str, choices: Sequence[str]) -> str | None:
        for label, choice in sorted(zip(self.labels, choices, strict=False), key=lambda pair: -len(pair[1])):
            if re.match(rf"(?:(?:an?|the)\s+)?{re.escape(choice)}(?!\w)", text, re.IGNORECASE):
                return label
        found = re.match(rf"\(?([{self._labels(choices)}])\)?(?![\w'’-])", text)
        return found[1] if found else None

    def _named(self, text: str, choices: Sequence[str], *, last: bool, by: str) -> Reading:
        places = []
        for label, choice in zip(self.labels, choices, strict=False):
            for found in re.finditer(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE):
                places.append((found.start() if not last else found.end(), len(choice), label))
        if not places:
            return NOTHING
        place = max(places) if last else min(places, key=lambda each: (each[0], -each[1]))
        return Reading(place[2], by)


@dataclass(frozen=True)
class Words:
    """Answers that are any text; case, space and a period at the end make no difference."""

    wanted = "text"
    asked = "Therefore, the answer is"
    permits = None

    def written(self, value: Any) -> str | None:
        """A text without space around it, or a number."""
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            return None
        return str(value).strip() or None

    def normalised(self, text: str) -> str | None:
        """Lower case, single spaces, no period at the end."""
        return re.sub(r"\.$", "", " ".join(text.casefold().split())).strip() or None

    def read(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """What follows ``The answer is`` or ``####`` in its line, else the last line."""
        found = re.search(rf"(?:{ANNOUNCED}|{MARK}\s*)(.+)", text)
        if found and (said := self.normalised(found[1])):
            return Reading(said, "strict")
        lines = [said for line in text.splitlines() if (said := self.normalised(line))]
        return Reading(lines[-1], "flexible") if lines else NOTHING

    def first(self, text: str, choices: Sequence[str] = ()) -> Reading:
        """The first line."""
        lines = [said for line in text.splitlines() if (said := self.normalised(line))]
        return Reading(lines[0], "first") if lines else NOTHING
