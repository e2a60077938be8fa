"""What was answered, on disk: every question with its scores in every row, and what made them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import qstar
from qstar.evaluation.questions import Question, Questions
from qstar.evaluation.report import Answered, Row, TaskReport
from qstar.evaluation.tables import finite_or_none
from qstar.whole_file import write_whole

SCHEMA = 1


def write_report(path: str | Path, reports: Sequence[TaskReport], *, command: str, seed: int, **more: Any) -> None:
    """Write reports as one JSON file, whole or not at all.

    Numbers that are not finite are null.

    Args:
        path: of the file, whose folder must exist.
        reports: one for each task.
        command: that made them, as it would be typed.
        seed: of draws and of sampled thoughts.
        more: further entries by name, as JSON can say them.
    """
    record = {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "versions": {"qstar": qstar.__version__} | {name: version(name) for name in ("torch", "transformers")},
        "tasks": [report.record() for report in reports],
    }
    text = json.dumps(finite_or_none(record | more), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(Path(path), text + "\n")


def read_report(path: str | Path) -> tuple[TaskReport, ...]:
    """What :func:`write_report` has written; equal to it where all numbers were finite, None where one was not.

    Raises:
        ValueError: the file is of another version, or no such file.
    """
    try:
        record = json.loads(Path(path).read_text())
        schema = record["schema"]
        if schema == SCHEMA:
            return tuple(map(_report, record["tasks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no report of an evaluation: {error!r}") from error
    raise ValueError(f"{path} is a report of schema {schema!r}, but this version reads {SCHEMA}")


def _report(record: dict[str, Any]) -> TaskReport:
    questions = tuple(_made(Question, each) for each in record["questions"])
    rows = tuple(
        Row(
            row["name"],
            tuple(_made(Answered, each["answers"][row["name"]]) for each in record["questions"]),
            row["settings"],
        )
        for row in record["rows"]
    )
    asked = Questions(questions, record["source"], record["fingerprint"])
    return TaskReport(record["task"], asked, rows, record["compared_with"])


def _made(kind: Any, record: dict[str, Any]) -> Any:
    """A dataclass of its fields in a record, where a list was a tuple."""
    values = {each.name: record[each.name] for each in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
