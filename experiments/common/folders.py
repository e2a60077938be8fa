"""A folder of results that several processes fill side by side, each piece a file that is whole or not there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import qstar
from qstar.evaluation.tables import finite_or_none
from qstar.training.folders import alone_in
from qstar.whole_file import write_whole

SETTINGS_FILE = "settings.json"
PAUSE = 0.2  # seconds between two looks whether a folder is free


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, once whoever has it is done."""
    while True:
        lock = alone_in(folder)
        try:
            lock.__enter__()
            break
        except BlockingIOError:
            time.sleep(PAUSE)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what decides the results in ``folder``, or hold it against what is written there.

    Args:
        folder: of the results, made where it is missing.
        settings: as JSON can say them.

    Raises:
        ValueError: the folder's results were made otherwise, with what differs.
    """
    path, wanted = folder / SETTINGS_FILE, json.loads(json.dumps(settings))
    with in_turn(folder):
        if not path.exists():
            write_json(path, wanted)
            return
        there = json.loads(path.read_text())
    names = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
    if names:
        said = ", ".join(f"{name} was {there.get(name)!r} and is {wanted.get(name)!r}" for name in names)
        raise ValueError(f"output_dir is {str(folder)!r}, whose results were made otherwise: {said}")


def read_json(path: Path) -> Any:
    """What :func:`write_json` has written."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; numbers that are not finite are null."""
    write_whole(path, json.dumps(finite_or_none(value), indent=1, allow_nan=False) + "\n")


def made_with() -> dict[str, Any]:
    """The versions and the device that a result comes from."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"versions": {"qstar": qstar.__version__} | packages, "device": device}
