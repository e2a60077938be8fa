"""Questions out of files."""

from __future__ import annotations

from pathlib import Path

from qstar.data.files import json_rows
from qstar.evaluation.questions import Question


def read_question_file(
    path: Path,
    question: str = "question",
    answer: str = "answer",
    rationale: str = "rationale",
    *,
    needs_rationales: bool = False,
) -> tuple[Question, ...]:
    """The questions in a ``.jsonl`` or ``.json`` file, with their answers.

    Args:
        path: of the file.
        question: the column of the questions.
        answer: that of the answers.
        rationale: that of the rationales.
        needs_rationales: read them; they are left aside otherwise.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind or cannot be read, with the place; a column is missing or holds no text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} should hold questions, but there is no such file")
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{str(path)!r} should hold questions, but such a file must end in .jsonl or .json")
    columns = (question, answer, *((rationale,) if needs_rationales else ()))
    found = []
    for number, row in enumerate(json_rows(str(path), str(path), columns, None)):
        for column in columns:
            if not isinstance(row[column], str):
                raise ValueError(f"{path}, row {number + 1}: column {column!r} holds a chat, but it must hold text")
        reasons = row[rationale] if needs_rationales else None
        found.append(Question(row[question], row[answer], rationale=reasons, number=number))
    return tuple(found)
