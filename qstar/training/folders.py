"""The folder of a run: which one it is, and that no other run is in it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from accelerate.utils import get_int_from_env

from qstar.training.checkpoints import last_whole_checkpoint
from qstar.training.savable import make_folder
from qstar.training.saving import SETTINGS_FILE
from qstar.training.trainer import METRICS_FILE

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = "_run.lock"  # of what begins so the Trainer pushes nothing to the hub
DEFAULT = Path("runs/quiet-star")
BEYOND = 1 << 30  # Windows locks bytes, and nobody could read those that say who is there


@contextmanager
def run_folder(output_dir: str | Path | None, resume: bool | str | Path | None) -> Iterator[Path]:
    """The folder of a run, made where it is missing, which no other run can have until this one ends.

    It is the given one, that of what is resumed, or the first free default. It goes again if nothing is written to it.

    Raises:
        FileExistsError: it holds an earlier run, which is not resumed.
        FileNotFoundError: there is no run to resume.
        BlockingIOError: another run is in it.
        OSError: it cannot be written to.
        ValueError: there are several runs to resume, or several processes to agree on the default's name.
    """
    folder = _folder(output_dir, resume)
    if get_int_from_env(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0) > 0:
        yield folder  # which the first of the processes has
        return
    with alone_in(folder):
        if not resume:
            check_unused(folder)
        yield folder


def check_unused(folder: Path) -> None:
    """Raise FileExistsError where ``folder`` holds an earlier run."""
    if (folder / METRICS_FILE).exists():
        raise FileExistsError(
            f"output_dir is {str(folder)!r}, but it holds an earlier run: go on with it by "
            "resume_from_checkpoint=True, or choose another folder"
        )


def default_folders() -> Iterator[Path]:
    """The names of a run's folder where none is given, in their order."""
    return (DEFAULT if number == 1 else DEFAULT.with_name(f"{DEFAULT.name}-{number}") for number in count(1))


def _folder(output_dir: str | Path | None, resume: bool | str | Path | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    if resume is True:
        return _unfinished_run()
    if resume:
        return Path(resume).parent
    if get_int_from_env(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1) > 1:
        raise ValueError("output_dir is missing: each of several processes would find another one free")
    for folder in default_folders():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):  # another run was quicker
                folder.mkdir()
                return folder
    raise AssertionError


def _unfinished_run() -> Path:
    """The one folder beside the default whose run was cut short; that with a checkpoint, where others have none."""
    begun = sorted(path.parent for path in DEFAULT.parent.glob(f"{DEFAULT.name}*/{METRICS_FILE}"))
    cut = [folder for folder in begun if not (folder / SETTINGS_FILE).exists()]
    if len(cut) > 1:  # every file of a checkpoint is read to see whether it is whole
        cut = [folder for folder in cut if last_whole_checkpoint(folder) is not None] or cut
    if not cut:
        raise FileNotFoundError(
            f"resume_from_checkpoint is True, but no run in {DEFAULT.parent} was cut short: name one by output_dir"
        )
    if len(cut) > 1:
        raise ValueError(
            f"resume_from_checkpoint is True, but {', '.join(map(str, cut))} were all cut short: name one by output_dir"
        )
    return cut[0]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock of the operating system on a file in ``folder``, which goes with the process however that ends."""
    make_folder(folder)
    path = folder / LOCK_FILE
    with path.open("a+") as file:
        if not _locked(file, path):
            file.seek(0)
            raise BlockingIOError(
                f"output_dir is {str(folder)!r}, but another run is in it at this time: {file.read().strip()}"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps a file that is open
                path.unlink()
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _locked(file: IO[str], path: Path) -> bool:
    """Whether ``file`` is locked from now on, and still the one at ``path``: a run that ends removes it."""
    try:
        if sys.platform == "win32":
            file.seek(BEYOND)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return True
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
