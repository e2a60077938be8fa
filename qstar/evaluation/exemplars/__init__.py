"""Worked questions to be shown before one that is asked, in the manner of Wei et al. (2022, arXiv 2201.11903).

The problems are our own: eight of grade-school arithmetic and seven of common sense.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qstar.evaluation.answers import Letters, Numbers
from qstar.evaluation.columns import Columns, given_columns, placed_rows, question_of
from qstar.evaluation.questions import Question
from qstar.evaluation.tasks import Task


def read_exemplars(task: Task, source: str | Path | None = None, **columns: Any) -> tuple[Question, ...]:
    """Exemplars of a task, each with its rationale.

    Args:
        task: that they are shown for.
        source: a ``.jsonl``, ``.json`` or ``.parquet`` file with ``question``, ``rationale``, ``answer`` and, where the
            task has them, ``choices``; None for ours.
        columns: that are called otherwise, see :func:`qstar.evaluation.tasks.find_task`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row holds no exemplar, with its place; there are none of ours for this kind of task.
    """
    answers = task.answers
    choices = "choices" if isinstance(answers, Letters) else None
    if source is None:
        source, answers = _ours(task)
    if not Path(source).is_file():
        raise FileNotFoundError(f"exemplars is {str(source)!r}, but there is no such file")
    known = replace(Columns(rationale="rationale", choices=choices), **given_columns(**columns))
    rows = placed_rows(source, None, None, "test")
    return tuple(question_of(row, known, answers, place, number) for number, (place, row) in enumerate(rows))


def _ours(task: Task) -> tuple[Path, Numbers | Letters]:
    if isinstance(task.answers, Numbers):
        return Path(__file__).with_name("arithmetic.json"), task.answers
    if isinstance(task.answers, Letters):
        return Path(__file__).with_name("commonsense.json"), Letters()
    raise ValueError(f"task {task.name!r} has answers of its own kind, for which there are no exemplars: give a file")
