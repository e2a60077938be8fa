"""Results as files: each whole or not there, and never taken for those of other settings.

A run that was stopped goes on where it was: what has its file is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.folders import made_with, read_json, write_json
from qstar.evaluation.tables import finite_or_none


def read_result(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What ``path`` holds: ``settings``, ``result``, ``seconds`` that it took, what it was made with; None without it.

    Raises:
        ValueError: it is the result of other settings.
    """
    if not path.is_file():
        return None
    found = read_json(path)
    asked = _as_json(settings)
    for name in sorted(found["settings"].keys() | asked.keys()):
        there, here = found["settings"].get(name), asked.get(name)
        if there != here:
            raise ValueError(
                f"{name} is {here!r}, but {path} is the result of {name} {there!r}: choose another folder, or remove it"
            )
    return found


def result_of(path: Path, settings: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What :func:`read_result` finds; where there is nothing, ``work`` is done and its result written first.

    Raises:
        ValueError: the file is the result of other settings.
    """
    found = read_result(path, settings)
    if found is None:
        began = time.monotonic()
        result = work()
        found = {"settings": settings, "seconds": round(time.monotonic() - began, 1), **made_with(), "result": result}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        found = read_json(path)
    return found


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """As a file gives it back: tuples are lists there."""
    return json.loads(json.dumps(finite_or_none(values)))
