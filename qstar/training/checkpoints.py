"""Which checkpoints are whole: each holds a manifest with the size and SHA-256 of every file, which is written last."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
VERSION = 1  # of the manifest
PARTIAL = "partial-"  # before the name of a checkpoint that is being written
PICKLED = (  # what transformers would read by unpickling
    *("pytorch_model*.bin*", "adapter_model.bin", "training_args.bin", "optimizer.bin", "optimizer.pt"),
    *("scheduler.pt", "scaler.pt", "rng_state*.pth", "*.distcp", ".metadata"),
)


def partial(checkpoint: Path) -> Path:
    """Where ``checkpoint`` lies while it is written: beside its place."""
    return checkpoint.with_name(PARTIAL + checkpoint.name)


def begin(checkpoint: Path) -> None:
    """Make an empty folder for ``partial(checkpoint)``.

    What is in the place of ``checkpoint``, from an earlier life of the run, goes; so does what a kill has left.
    """
    (checkpoint / MANIFEST_FILE).unlink(missing_ok=True)  # first: a kill in the middle leaves nothing that seems whole
    for left in (checkpoint, *checkpoint.parent.glob(f"{PARTIAL}{PREFIX_CHECKPOINT_DIR}-*")):
        if left.exists():
            shutil.rmtree(left)
    partial(checkpoint).mkdir(parents=True)


def finish(checkpoint: Path) -> None:
    """Put ``partial(checkpoint)`` in its place, with a manifest, when every file is on the disk."""
    folder = partial(checkpoint)
    entries = []
    for name, path in _files(folder).items():
        entries.append({"name": name, "size": path.stat().st_size, "sha256": _sha256(path)})
        _sync(path)
    manifest = folder / MANIFEST_FILE
    manifest.write_bytes(_manifest(entries))
    _sync(manifest)
    for each in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(each)
    folder.rename(checkpoint)
    _sync(checkpoint.parent)


def rotate(latest: Path, best: str | None, limit: int | None) -> None:
    """Keep no more than ``limit`` checkpoints beside each other: ``latest``, ``best``, and the newest of the others.

    Those with a later step than ``latest`` are from an earlier life of the run, and go first.
    """
    if limit is None or limit < 1:
        return
    kept = {latest} if best is None else {latest, Path(best)}
    others = [each for each in latest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if each not in kept]
    others.sort(key=lambda each: (_step(each) <= _step(latest), _step(each)))
    for each in others[: max(0, len(others) + len(kept) - max(limit, len(kept)))]:
        (each / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(each, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, with the name of the file, or None if it is as it was written."""
    try:
        return _fault(checkpoint)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _fault(checkpoint: Path) -> str | None:
    if not checkpoint.is_dir():
        return "there is no such folder"
    files = _files(checkpoint)
    for name, path in files.items():
        if any(fnmatch(path.name, pattern) for pattern in PICKLED):
            return f"{name} would have to be unpickled, which could run any code: only safetensors and JSON are read"
    manifest = checkpoint / MANIFEST_FILE
    if not manifest.is_file():
        return f"{MANIFEST_FILE} is missing, which is written last: it was cut short"
    written = manifest.read_bytes()
    try:
        listed = {entry["name"]: entry for entry in json.loads(written)["files"]}
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST_FILE} is damaged"
    if written != _manifest(list(listed.values())):
        return f"{MANIFEST_FILE} is damaged, or of another version"
    for name in sorted(listed.keys() - files.keys()):
        return f"{name} is missing"
    for name in sorted(files.keys() - listed.keys()):
        return f"{name} is not in its {MANIFEST_FILE}"
    for name, path in files.items():
        size = path.stat().st_size
        if size != listed[name]["size"]:
            return f"{name} has {size} bytes, but {listed[name]['size']} were written"
    for name, path in files.items():
        if _sha256(path) != listed[name]["sha256"]:
            return f"{name} is not what was written: its SHA-256 is another"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """The files in a folder and those below, but for its manifest, by their names in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files.pop(MANIFEST_FILE, None)
    return files


def _manifest(entries: list[dict[str, Any]]) -> bytes:
    """A manifest as it is written, with its own SHA-256 as well, so that no change to it is blamed on a file."""
    content = {"version": VERSION, "files": entries}
    own = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps(content | {"sha256": own}, indent=1).encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_finished(checkpoint: Path, max_steps: int, epochs: float) -> bool:
    """Whether a run that ends after ``max_steps``, or after ``epochs`` where that is not above 0, has no step left."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    if max_steps > 0:
        return bool(state["global_step"] >= max_steps)
    return bool(state["epoch"] is not None and state["epoch"] >= epochs)


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The latest checkpoint in ``folder`` that is as it was written; None if there is none.

    What is wrong with later ones is logged.
    """
    for checkpoint in sorted(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step, reverse=True):
        wrong = fault(checkpoint)
        if wrong is None:
            return checkpoint
        logger.warning("%s is left out: %s", checkpoint, wrong)
    return None


def checkpoint_to_resume(folder: Path, resume: bool | str | Path | None) -> Path | None:
    """The checkpoint that a run in ``folder`` goes on with: the last whole one (True) or a given one; None for none.

    Raises:
        ValueError: the given one is not as it was written.
    """
    if resume is True:
        checkpoint = last_whole_checkpoint(folder)
        if checkpoint is None:
            logger.warning("%s holds no whole checkpoint: training begins at the beginning", folder)
        return checkpoint
    if not resume:
        return None
    checkpoint = Path(resume)
    wrong = fault(checkpoint)
    if wrong is not None:
        raise ValueError(f"resume_from_checkpoint is {str(checkpoint)!r}, but {wrong}")
    return checkpoint
