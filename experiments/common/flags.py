"""The flags of commands that run jobs, and what they do with them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.deadline import Deadline
from common.jobs import Job, run_jobs
from qstar.training.folders import alone_in
from tasks.every import TASKS


def setting(text: str) -> tuple[str, Any]:
    """``name=value`` with a value in JSON, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def job_flags(about: str | None, *, seeds: Sequence[int], folder: str) -> argparse.ArgumentParser:
    """The flags that such commands have in common; ``seeds`` and ``folder`` are their defaults."""
    flags = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("rung", nargs="?", choices=list(TASKS), help="the task")
    flags.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="S")
    flags.add_argument("--output-dir", type=Path, default=Path(folder), metavar="FOLDER")
    flags.add_argument("--processes", type=int, default=1, metavar="N", help="worked on at a time, one core each")
    flags.add_argument("--minutes", type=float, metavar="M", help="begin nothing after so many")
    flags.add_argument("--problems", type=int, default=500, metavar="N", help="that are asked")
    flags.add_argument("--split", choices=["validation", "test"], default="test", help="validation to choose settings")
    flags.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=VALUE", help="settings of training")
    flags.add_argument("--summarize", action="store_true", help="write tables and plots of what is there")
    return flags


def run(
    flags: argparse.ArgumentParser,
    given: argparse.Namespace,
    jobs: Callable[[argparse.Namespace], list[Job]],
    summarize: Callable[[Path], str],
) -> int:
    """Do what the flags say; the exit code.

    Args:
        flags: which complain where there is neither a rung nor ``--summarize``.
        given: what they were given.
        jobs: of the command.
        summarize: writes a summary of a folder, and returns it.
    """
    try:
        if given.summarize:
            print(summarize(given.output_dir))
            return 0
        if given.rung is None:
            flags.error("a rung is needed, or --summarize")
        asked = jobs(given)
        deadline = Deadline(None if given.minutes is None else 60 * given.minutes)
        folder = given.output_dir / given.rung
        with alone_in(folder):
            left = run_jobs(asked, folder, deadline, given.processes)
    except (ValueError, FileNotFoundError, BlockingIOError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if left:
        print(f"{left} of {len(asked)} are left: the same command goes on")
    return 0
