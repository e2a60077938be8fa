"""Local files of text, read as they stand: what is wrong in one is named by file, line, column and what was found.

JSON is not left to ``datasets``, which reads text that looks like a date as a date, and puts all texts into quotes
where a number stands among them.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from qstar.data.values import checked, found

DOCUMENTS = {"paragraph": "paragraph", "line": "line", "file": "document"}  # ours, and what datasets calls them
SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
UTF8 = "utf-8-sig"  # which leaves out a byte-order mark


def load_file(path: Path, documents: str, columns: Iterable[str] | None, name: str) -> Dataset:
    """The rows of a file; see :func:`qstar.data.load_texts`."""
    if not path.stat().st_size:
        raise ValueError(f"{name} is {str(path)!r}, but the file is empty")
    try:
        return _read(path, documents, columns)
    except (DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if path.suffix in (".json", ".jsonl") and type(cause) is ValueError:
            raise cause from None  # of json_rows, with its place
        if isinstance(cause, UnicodeDecodeError):
            for _ in decoded_lines(path, str(path)):  # which raises with the place
                pass
        raise ValueError(f"{name} is {str(path)!r}, but it cannot be read as {path.suffix}: {cause}") from error


def _read(path: Path, documents: str, columns: Iterable[str] | None) -> Dataset:
    if path.suffix == ".txt":
        return Dataset.from_text(glob.escape(str(path)), encoding=UTF8, sample_by=DOCUMENTS[documents])
    if path.suffix == ".parquet":
        return Dataset.from_parquet(glob.escape(str(path)))
    kept = None if columns is None else tuple(columns)  # no list, which from_generator would share out
    state = path.stat()  # a part of the cache's key: a file that has changed is read again
    version = (state.st_mtime_ns, state.st_size)
    options = {"path": str(path.resolve()), "name": str(path), "columns": kept, "version": version}
    return Dataset.from_generator(json_rows, gen_kwargs=options)


def json_rows(path: str, name: str, columns: tuple[str, ...] | None, version: Any) -> Iterator[dict[str, Any]]:
    """The objects in a file of JSON lines or of one JSON list.

    Args:
        path: of the file.
        name: what errors call it.
        columns: to keep, which must hold text or chats; None for those of the first object, unchecked.
        version: of the file; not read here.

    Raises:
        ValueError: what cannot be read, with its place.
    """
    first: dict[str, Any] | None = None
    for place, row in placed_objects(Path(path), name):
        if not isinstance(row, dict):
            raise ValueError(f"{place} holds {found(row)}, but it must hold an object")
        for column in columns or ():
            if column not in row:
                raise ValueError(f"{place} has no column {column!r}, but {', '.join(map(repr, row)) or 'nothing'}")
        first = first or row
        if columns is None:
            yield {column: row.get(column) for column in first}
        else:
            yield {column: checked(row[column], column, place) for column in columns}
    if first is None:
        raise ValueError(f"{name} holds no rows")


def placed_objects(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """What a file of JSON lines or of one JSON list holds, each with its place as errors name it.

    Raises:
        ValueError: what is not JSON in UTF-8, with its place; ``name`` stands for the file.
    """
    lines = ((number, line) for number, line in decoded_lines(path, name) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    try:
        by_line = not isinstance(json.loads(first[1]), list)
    except json.JSONDecodeError:
        by_line = path.suffix == ".jsonl" and not first[1].lstrip().startswith("[")
    if by_line:
        yield f"{name}, line {first[0]}", _parsed(first[1].rstrip("\r\n"), name, first[0])
        for number, line in lines:
            yield f"{name}, line {number}", _parsed(line.rstrip("\r\n"), name, number)
        return
    whole = _parsed("".join(line for _, line in decoded_lines(path, name)), name, 1)
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{name}, row {number}", row


def _parsed(text: str, name: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{name}, line {first_line + error.lineno - 1}, character {error.colno}"
        cut = "it ends too soon" if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else error.msg
        raise ValueError(f"{place}: this is not JSON: {cut}") from None


def decoded_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers from 1, without a byte-order mark.

    Raises:
        ValueError: a line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode(UTF8 if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                character = len(line[: error.start].decode()) + 1
                raise ValueError(
                    f"{name}, line {number}, character {character}: the byte 0x{line[error.start]:02x} is not UTF-8, "
                    "which files must be written in"
                ) from None
