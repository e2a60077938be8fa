"""What is asked, and what is right."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qstar.data import AnyDataset

if TYPE_CHECKING:
    from qstar.evaluation.tasks import Task


@dataclass(frozen=True)
class Question:
    """One of a task.

    Attributes:
        text: as the data set says it.
        answer: the right one: a number, a text, or the letter of a choice.
        choices: texts of the choices; empty where the answer is open.
        labels: their letters, A and so on, whatever the data set calls them.
        rationale: the data set's own reasoning, without the answer; None where it has none.
        number: of its row in the data set, from 0.
    """

    text: str
    answer: str
    choices: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    rationale: str | None = None
    number: int = 0

    @property
    def right_choice(self) -> int:
        """The number of the right choice, from 0."""
        return self.labels.index(self.answer)


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


def read_questions(
    task: Task,
    source: str | Path | AnyDataset | None = None,
    *,
    split: str | None = None,
    max_questions: int | None = None,
    seed: int = 0,
) -> Questions:
    """The questions of a task, or some of them.

    Args:
        task: what is asked.
        source: a hub name, a file, a folder or a ``datasets`` object with the task's columns; None for its own.
        split: of a hub data set; None for the one that the task is evaluated on.
        max_questions: draw so many, which stay in their order; None for all.
        seed: of the draw. It is the same on every machine.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it cannot be read, or a row of it holds no question, with the place; ``max_questions`` is below 1.
    """
    if max_questions is not None and (isinstance(max_questions, bool) or max_questions < 1):
        raise ValueError(f"max_questions is {max_questions!r}, but it must be an integer of at least 1")
    name, questions = task.every_question(source, split)
    drawn = draw(questions, max_questions, seed)
    return Questions(drawn, name, fingerprint(drawn))


def draw(questions: Sequence[Question], count: int | None, seed: int) -> tuple[Question, ...]:
    """``count`` of the questions in their order; all where there are no more, or where it is None."""
    if count is None or count >= len(questions):
        return tuple(questions)

    def lot(place: int) -> bytes:
        return hashlib.sha256(f"{seed} {place}".encode()).digest()

    return tuple(questions[place] for place in sorted(sorted(range(len(questions)), key=lot)[:count]))


def fingerprint(questions: Sequence[Question]) -> str:
    """SHA-256 of the questions as JSON with sorted names and without space, in hexadecimal digits."""
    text = json.dumps([asdict(each) for each in questions], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
