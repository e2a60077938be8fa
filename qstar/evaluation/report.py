"""What was answered, in rows that can be compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qstar.evaluation.questions import Questions


@dataclass(frozen=True)
class Answered:
    """How one question was answered.

    Attributes:
        right: whether the answer is right.
        probability: of the right answer among the permitted ones; None where text was generated.
        log_likelihood: of all tokens of the right answer, nats; None where text was generated.
        said: the answer that was given; None where none could be read.
        detail: more of it, as JSON can say it.
    """

    right: bool
    probability: float | None = None
    log_likelihood: float | None = None
    said: str | None = None
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One way to answer all questions of a task.

    Attributes:
        name: of the row.
        answers: one for each question, in their order.
        settings: that made them.
    """

    name: str
    answers: tuple[Answered, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class TaskReport:
    """A task's rows over the same questions.

    Attributes:
        task: its name.
        questions: that were asked.
        rows: the first one is what the others are compared with.
    """

    task: str
    questions: Questions
    rows: tuple[Row, ...]
