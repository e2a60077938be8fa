"""What is asked, and what is right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One of a task.

    Attributes:
        text: as the data set says it.
        answer: the right one: a number, a letter, or the text of a choice.
        choices: texts of the choices; empty where the answer is open.
        labels: their letters.
        rationale: the data set's own reasoning, without the answer; None where it has none.
        number: of its row in the data set.
    """

    text: str
    answer: str
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    rationale: str | None = None
    number: int = 0


@dataclass(frozen=True)
class Questions:
    """Those that were drawn from a source.

    Attributes:
        questions: in the order in which they are asked.
        source: hub name or path.
        fingerprint: SHA-256 of what they say, in hexadecimal digits.
    """

    questions: tuple[Question, ...]
    source: str
    fingerprint: str
