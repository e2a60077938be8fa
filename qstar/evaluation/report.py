"""What was answered, in rows that can be compared."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import isnan
from typing import Any, NamedTuple

from qstar.evaluation.intervals import Changes, Interval, bootstrap, changes, paired, wilson
from qstar.evaluation.questions import Questions
from qstar.evaluation.tables import table

ACCURACY, PROBABILITY, LOG_LIKELIHOOD = "accuracy", "probability", "log_likelihood"
METRICS = (ACCURACY, PROBABILITY, LOG_LIKELIHOOD)
WIDTH = 100  # of a table, in characters
SHORTEST = 16  # width of a row's name, which goes on in the next line


class Mean(NamedTuple):
    """Over questions, with its 95 % interval; see :mod:`qstar.evaluation.intervals`."""

    value: float
    interval: Interval


def share_right(right: int, asked: int) -> Mean:
    """Of so many right answers among those that were asked."""
    return Mean(right / asked, wilson(right, asked))


class Gain(NamedTuple):
    """Of a row beside the reference, over the same questions.

    Attributes:
        means: of the differences, by metric; None where one of the two is not known.
        changes: of right and wrong answers.
    """

    means: dict[str, Mean | None]
    changes: Changes


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
        settings: that made them, as JSON can say them.
    """

    name: str
    answers: tuple[Answered, ...]
    settings: dict[str, Any]

    def values(self, metric: str) -> list[float] | None:
        """One of ``METRICS`` of every answer; None where it is not known of each."""
        found = [each.right if metric == ACCURACY else getattr(each, metric) for each in self.answers]
        return None if any(value is None for value in found) else [float(value) for value in found]

    def mean(self, metric: str) -> Mean | None:
        """Of one of ``METRICS``, nats for the log-likelihood; None where it is not known of each answer."""
        values = self.values(metric)
        if values is None:
            return None
        if metric == ACCURACY:
            return share_right(int(sum(values)), len(values))
        return Mean(sum(values) / len(values), bootstrap(values))

    def gain(self, reference: Row) -> Gain:
        """What this row has beyond ``reference``, question by question."""
        means: dict[str, Mean | None] = {}
        for metric in METRICS:
            mine, its = self.values(metric), reference.values(metric)
            if mine is None or its is None:
                means[metric] = None
            else:
                means[metric] = Mean((sum(mine) - sum(its)) / len(mine), paired(mine, its))
        right = [[answer.right for answer in row.answers] for row in (self, reference)]
        return Gain(means, changes(*right))


@dataclass(frozen=True)
class TaskReport:
    """A task's rows over the same questions.

    Attributes:
        task: its name.
        questions: that were asked.
        rows: ways to answer them.
        compared_with: name of the row that the others are compared with; the first one by default.

    Raises:
        ValueError: there is no question or no row; a row has another number of answers than there are questions; two
            rows have one name; there is no row ``compared_with``.
    """

    task: str
    questions: Questions
    rows: tuple[Row, ...]
    compared_with: str | None = None

    def __post_init__(self) -> None:
        asked, names = len(self.questions.questions), [row.name for row in self.rows]
        if not asked or not names:
            raise ValueError(f"{self.task} has {asked} questions and {len(names)} rows, but it must have one of each")
        for row in self.rows:
            if len(row.answers) != asked:
                raise ValueError(f"row {row.name!r} has {len(row.answers)} answers, but there are {asked} questions")
        if len(set(names)) < len(names):
            raise ValueError(f"rows are {names}, but each must have a name of its own")
        if self.compared_with not in (None, *names):
            raise ValueError(f"compared_with is {self.compared_with!r}, but the rows are {names}")

    @property
    def reference(self) -> Row:
        """The row that the others are compared with."""
        return next((row for row in self.rows if row.name == self.compared_with), self.rows[0])

    @cached_property
    def means(self) -> dict[str, dict[str, Mean | None]]:
        """Of each row by its name, of each of ``METRICS``; None where it is not known of each answer."""
        return {row.name: {metric: row.mean(metric) for metric in METRICS} for row in self.rows}

    @cached_property
    def gains(self) -> dict[str, Gain]:
        """Of each row but the reference, by its name."""
        return {row.name: row.gain(self.reference) for row in self.rows if row is not self.reference}

    def table(self) -> str:
        """Means with 95 % intervals for each row; then how each differs from the reference, question by question.

        At most ``WIDTH`` characters wide. A column that no row has is left out, and so is the comparison of one row.
        """
        means = _block(
            f"{self.task}, {len(self.questions.questions)} questions of {self.questions.source}, with 95 % intervals",
            {
                name: {
                    "accuracy": percent(mean[ACCURACY]),
                    "probability": percent(mean[PROBABILITY]),
                    "log-likelihood": _nats(mean[LOG_LIKELIHOOD]),
                }
                for name, mean in self.means.items()
            },
        )
        if not self.gains:
            return means
        return f"{means}\n\n" + _block(
            f"compared with {self.reference.name!r}, question by question",
            {
                name: {
                    "points of accuracy": _points(gain.means[ACCURACY]),
                    "log-likelihood": _nats(gain.means[LOG_LIKELIHOOD], "+"),
                    "repaired": str(gain.changes.repaired),
                    "broken": str(gain.changes.broken),
                    "p": _chance(gain.changes.p_value),
                }
                for name, gain in self.gains.items()
            },
        )

    def record(self) -> dict[str, Any]:
        """All of it, with the numbers of the table, as dictionaries and lists; each question with its answers by row.

        What is not finite is as it is: :func:`qstar.evaluation.tables.finite_or_none` makes it fit for JSON.
        """
        return {
            "task": self.task,
            "source": self.questions.source,
            "fingerprint": self.questions.fingerprint,
            "asked": len(self.questions.questions),
            "compared_with": self.compared_with,
            "rows": [
                {"name": row.name, "settings": row.settings}
                | _by_metric(self.means[row.name])
                | ({"gain": _gained(self.gains[row.name])} if row.name in self.gains else {})
                for row in self.rows
            ],
            "questions": [
                asdict(question) | {"answers": {row.name: asdict(row.answers[number]) for row in self.rows}}
                for number, question in enumerate(self.questions.questions)
            ],
        }


def _by_metric(means: dict[str, Mean | None]) -> dict[str, Any]:
    return {metric: mean and {"mean": mean.value, "interval": list(mean.interval)} for metric, mean in means.items()}


def _gained(gain: Gain) -> dict[str, Any]:
    return _by_metric(gain.means) | gain.changes._asdict() | {"p_value": gain.changes.p_value}


def _block(title: str, rows: dict[str, dict[str, str]]) -> str:
    """A titled table of cells by row and column, without the columns in which no row has anything."""
    header = [column for column in next(iter(rows.values())) if any(cells[column] for cells in rows.values())]
    taken = sum(2 + max(len(column), *(len(cells[column]) for cells in rows.values())) for column in header)
    lines = []
    for name, cells in rows.items():
        first, *rest = textwrap.wrap(name, max(SHORTEST, WIDTH - taken), subsequent_indent="  ") or [""]
        lines.append([first, *(cells[column] for column in header)])
        lines += [[more, *("" for _ in header)] for more in rest]
    return f"{textwrap.fill(title, WIDTH)}\n\n{table(['', *header], lines)}"


def percent(mean: Mean | None) -> str:
    """As ``61.2% [57.0, 65.3]``; nothing where there is no mean."""
    return _shown(mean, lambda value: f"{100 * value:.1f}", "%")


def _points(mean: Mean | None) -> str:
    return _shown(mean, lambda value: f"{100 * value:+.1f}")


def _nats(mean: Mean | None, sign: str = "") -> str:
    return _shown(mean, lambda value: f"{value:{sign}.3f}")


def _shown(mean: Mean | None, number: Callable[[float], str], unit: str = "") -> str:
    """A mean, and its interval where there is one; nothing where there is no mean."""
    if mean is None:
        return ""
    bounds = "" if isnan(mean.interval.low) else f" [{', '.join(map(number, mean.interval))}]"
    return f"{number(mean.value)}{unit}{bounds}"


def _chance(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
