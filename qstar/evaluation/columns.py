"""Questions from the rows of a data set, whose columns a task names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeAlias

from qstar.data import AnyDataset, load_texts
from qstar.data.files import placed_objects
from qstar.data.values import checked_text, found
from qstar.evaluation.answers import Answers, Letters
from qstar.evaluation.questions import Question

CALCULATOR = re.compile(r"<<.*?>>")  # GSM8K's own notes of what a calculator is asked
FILES = (".json", ".jsonl", ".parquet")
Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Where in a row of a data set to find what.

    Attributes:
        question: the columns that make up a question, a space between them.
        answer: the right answer: a number, a text, or of a choice its label, its text, or its place from 0 where the
            data set has no labels.
        choices: texts of the choices, as a list, or with their labels as ``{"text": [...], "label": [...]}``; None
            where the answer is open.
        labels: the labels as a list of their own.
        rationale: the reasoning that leads to the answer.
        mark: what stands between reasoning and answer where ``answer`` holds both.
    """

    question: tuple[str, ...] = ("question",)
    answer: str = "answer"
    choices: str | None = None
    labels: str | None = None
    rationale: str | None = None
    mark: str | None = None

    def names(self) -> list[str]:
        """All columns that a row must have."""
        return [*self.question, *(each for each in (self.answer, self.choices, self.labels, self.rationale) if each)]


def given_columns(**columns: str | Sequence[str]) -> dict[str, Any]:
    """Fields of :class:`Columns` by the names of arguments: ``question_column``, ``answer_column`` and so on.

    Raises:
        TypeError: there is no such argument.
        ValueError: it names no column.
    """
    known = {f"{each.name}_column": each.name for each in fields(Columns) if each.name != "mark"}
    changed: dict[str, Any] = {}
    for name, value in columns.items():
        if name not in known:
            raise TypeError(f"{name!r} is no argument here, but there are {', '.join(known)}")
        values = [value] if isinstance(value, str) else list(value)
        if not values or not all(isinstance(each, str) and each for each in values):
            raise ValueError(f"{name} is {value!r}, but it must name a column")
        if len(values) > 1 and name != "question_column":
            raise ValueError(f"{name} is {value!r}, but it must name one column")
        changed[known[name]] = tuple(values) if name == "question_column" else values[0]
    return changed


def placed_rows(
    source: str | Path | AnyDataset, config: str | None, split: str | None, default_split: str
) -> Iterator[tuple[str, Row]]:
    """Rows, each with its place as errors name it.

    Args:
        source: a hub name, a folder, a file or an object of ``datasets``.
        config: the configuration of a hub data set.
        split: of a hub data set or a folder; None for ``default_split``.
        default_split: the one that a task is evaluated on.

    Raises:
        FileNotFoundError: there is no such file, and no such data set on the hub.
        ValueError: it cannot be read or holds no rows; a split is asked for where there are none.
    """
    name = str(source) if isinstance(source, (str, Path)) else "dataset"
    if isinstance(source, (str, Path)) and Path(source).is_file():
        if split is not None:
            raise ValueError(f"split is {split!r}, but {name} is a file, which has no splits")
        if Path(source).suffix not in FILES:
            raise ValueError(f"source is {name!r}, but a file of questions must end in {', '.join(FILES)}")
        if Path(source).suffix == ".parquet":
            rows = _numbered(load_texts(source, name="source"), name)
        else:
            rows = placed_objects(Path(source), name)
    else:
        if split is None:
            split = "test" if isinstance(source, AnyDataset) else default_split
        rows = _numbered(load_texts(source, split, config=config, name="source"), name)
    empty = True
    for place, row in rows:
        empty = False
        if not isinstance(row, dict):
            raise ValueError(f"{place} holds {found(row)}, but it must hold an object")
        yield place, row
    if empty:
        raise ValueError(f"{name} holds no rows")


def _numbered(rows: AnyDataset, name: str) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def question_of(row: Row, columns: Columns, answers: Answers, place: str, number: int) -> Question:
    """The question that a row holds.

    Args:
        row: values by the names of columns.
        columns: to read.
        answers: the kind that is right.
        place: of the row, for errors.
        number: of the row, from 0.

    Raises:
        ValueError: a column is not there, or holds something else; the error says what it should be.
    """
    for column in columns.names():
        if column not in row:
            raise ValueError(f"{place} has no column {column!r}, but {', '.join(map(repr, row)) or 'nothing'}")
    text = " ".join(_text(row[each], each, place) for each in columns.question)
    answer = row[columns.answer]
    rationale = None if columns.rationale is None else _text(row[columns.rationale], columns.rationale, place)
    if columns.mark is not None:
        before, mark, answer = _text(answer, columns.answer, place).rpartition(columns.mark)
        if not mark:
            raise ValueError(
                f"{place}: column {columns.answer!r} holds {found(row[columns.answer])}, but it must hold an answer "
                f"behind {columns.mark!r}"
            )
        answer = answer.strip()
        if rationale is None:
            rationale = CALCULATOR.sub("", before).strip() or None
    if columns.choices is None:
        right = answers.written(answer)
        if right is None:
            raise ValueError(_wrong(place, columns.answer, answer, answers.wanted))
        return Question(text, right, rationale=rationale, number=number)
    choices, labels = _choices(row, columns, answers, place)
    right = ascii_uppercase[_right_choice(answer, choices, labels, columns.answer, place)]
    return Question(text, right, choices, tuple(ascii_uppercase[: len(choices)]), rationale, number)


def listed_choices(value: Any, column: str, place: str) -> tuple[list[Any], Any]:
    """What stands for the choices of a question, and their labels or None, unchecked.

    Raises:
        ValueError: ``value`` lists no choices.
    """
    if isinstance(value, dict) and "text" in value:
        texts, labels = value["text"], value.get("label")
    elif isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        texts, labels = [each.get("text") for each in value], [each.get("label") for each in value]
    else:
        texts, labels = value, None
    if not isinstance(texts, list):
        raise ValueError(_wrong(place, column, value, "an object with 'text' and 'label', or a list of texts"))
    return texts, labels


def _choices(
    row: Row, columns: Columns, answers: Answers, place: str
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Texts of the choices, and their labels where the data set has some."""
    column = columns.choices
    assert column is not None
    listed, labels = listed_choices(row[column], column, place)
    texts = tuple(_text(str(each) if _is_number(each) else each, column, place) for each in listed)
    most = answers.count if isinstance(answers, Letters) else 0
    if not 2 <= len(texts) <= most:
        raise ValueError(f"{place}: column {column!r} holds {len(texts)} choices, but there must be 2 to {most}")
    if columns.labels is not None:
        column, labels = columns.labels, row[columns.labels]
    elif labels is None:
        return texts, None
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise ValueError(_wrong(place, column, labels, f"{len(texts)} labels, one for each choice"))
    names = tuple(str(each).strip() for each in labels)
    if len({*names}) < len(names) or not all(names) or None in labels:
        raise ValueError(_wrong(place, column, labels, "labels that differ"))
    return texts, names


def _right_choice(
    answer: Any, choices: tuple[str, ...], labels: tuple[str, ...] | None, column: str, place: str
) -> int:
    """Which of the choices an answer is: by its label, by its text, or by its place where there are no labels."""
    known = labels or tuple(ascii_uppercase[: len(choices)])
    texts = [each.strip() for each in choices]
    said = str(answer).strip() if isinstance(answer, str) or _is_number(answer) else ""
    meant = {known.index(said)} if said in known else set()
    if not (labels and meant):
        meant |= {texts.index(said)} if texts.count(said) == 1 else set()
    if labels is None and answer in range(len(choices)) and _is_number(answer):
        meant.add(int(answer))
    if len(meant) == 1:
        return meant.pop()
    wanted = f"one of the labels {', '.join(map(repr, known))}, or the text of a choice"
    wanted += "" if labels else f", or 0 to {len(choices) - 1}"
    raise ValueError(_wrong(place, column, answer, f"{wanted}, and may stand for one choice only" if meant else wanted))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any, column: str, place: str) -> str:
    if not checked_text(value, column, place).strip():
        raise ValueError(_wrong(place, column, value, "text that is not blank"))
    return str(value)


def _wrong(place: str, column: str, value: Any, wanted: str) -> str:
    return f"{place}: column {column!r} holds {found(value)}, but it must hold {wanted}"
