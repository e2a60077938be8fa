"""Answers on disk while they are made, so that an evaluation that was killed goes on where it was.

One file of JSON lines for each row of a task. The first line says all that decides the answers; each later one holds
one answer. A line counts once its end is there, so that what a kill has cut short is dropped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from qstar.adapters import holds_adapters, stored_base
from qstar.config import CONFIG_FILE
from qstar.evaluation.report import Answered

VERSION = 1  # of these files
DECIDING = (  # files of a model's folder that decide what it answers
    *("config.json", "adapter_config.json", CONFIG_FILE),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"),
)


def model_identity(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What tells a model from every other: its folder's files by their SHA-256, or its hub name and revision.

    A folder of adapters also has the identity of its base.

    Args:
        model: a folder, or a name on the hub.
        revision: of the hub; a commit where it is known, since a branch may move.

    Raises:
        FileNotFoundError: the folder holds no safetensors.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {"hub": str(model), "revision": revision}
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("qstar/*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no safetensors: it is not the folder of a model")
    paths = [*weights, *(folder / name for name in DECIDING if (folder / name).is_file())]
    identity: dict[str, Any] = {"files": {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}}
    return identity | ({"base": model_identity(*stored_base(folder))} if holds_adapters(folder) else {})


def store_path(folder: str | Path, task: str, row: str) -> Path:
    """The file of a task's row in ``folder``: its name can be read, and no two rows share one."""
    words = re.sub(r"[^\w.-]+", "-", f"{task}-{row}").strip("-.")[:80]
    return Path(folder) / f"{words}-{hashlib.sha256(json.dumps([task, row]).encode()).hexdigest()[:8]}.jsonl"


class AnswerStore:
    """The answers of a row that are there, by the place of their question, and room for the others.

    >>> with AnswerStore(store_path(folder, task.name, name), header) as store:
    ...     for place in range(len(questions)):
    ...         if place not in store:
    ...             store.add(place, answer(questions[place]))

    What is added is handed to the operating system at once: it outlives this process, however that ends.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        """Open the file, or begin it, in a folder that is made where it is missing.

        Args:
            path: of the file.
            header: all that decides the answers, as JSON can say it: the task, the questions' fingerprint, the row and
                its settings, the model's identity.

        Raises:
            ValueError: the file has another header, with the name of what differs; or a line in it is damaged.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._answers: dict[int, Answered] = {}
        wanted = json.loads(json.dumps({"version": VERSION} | header))
        self._file = self.path.open("a+b")
        try:
            whole = self._read(wanted)
            self._file.truncate(whole)
            if not whole:
                self._write(wanted)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, place: int) -> bool:
        return place in self._answers

    def __getitem__(self, place: int) -> Answered:
        return self._answers[place]

    def __len__(self) -> int:
        return len(self._answers)

    def __iter__(self) -> Iterator[int]:
        return iter(self._answers)

    def add(self, place: int, answered: Answered) -> None:
        """Keep the answer to the question at ``place``; its detail as JSON can say it."""
        self._write({"place": place, **asdict(answered)})
        self._answers[place] = answered

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def _read(self, wanted: dict[str, Any]) -> int:
        """Take the answers that are there; how many bytes of the file are whole lines."""
        self._file.seek(0)
        lines = self._file.read().split(b"\n")[:-1]  # the last one has no end
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                if number:
                    place = record.pop("place")
                    self._answers[place] = Answered(**record)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"line {number + 1} of {self.path} is damaged, which no kill does: remove the file to begin again"
                ) from error
            if not number and record != wanted:
                raise ValueError(
                    f"{self.path} holds answers that were made otherwise: {_difference(record, wanted)}; "
                    "remove the file, or write to another folder"
                )
        return sum(len(line) + 1 for line in lines)


def _difference(there: Any, wanted: Any) -> str:
    """What differs between two headers, by dotted names."""
    old, new = _flat(there), _flat(wanted)
    names = [name for name in [*new, *old] if old.get(name, ...) != new.get(name, ...)]
    return ", ".join(f"{name} was {_said(old, name)} and is {_said(new, name)}" for name in dict.fromkeys(names))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    parts = [_flat(each, f"{name}.{key}" if name else key) for key, each in value.items()]
    return {key: each for part in parts for key, each in part.items()}


def _said(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "missing"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
