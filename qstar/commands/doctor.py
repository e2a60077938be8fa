"""``qstar doctor``: whether all is well here, on one page."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator

from qstar.doctor.findings import Finding, problems
from qstar.doctor.versions import check_versions

ADVICE = "install again, in a new environment: pip install -c constraints.txt -e ."


def run(arguments: list[str]) -> int:
    """Print what is found as it is found; 1 where there is a problem."""
    parser = argparse.ArgumentParser(
        prog="qstar doctor",
        description="Whether all is well here: versions, devices, the backend of each op, threads and disks; then a "
        "tiny model thinks, generates and learns. Needs no network. The exit code is 1 where there is a problem.",
    )
    parser.parse_args(arguments)
    found = []
    for finding in check_all():
        print(line_of(finding), flush=True)
        found.append(finding)
    wrong = problems(found)
    print(f"\n{len(wrong)} of {len(found)} findings are problems" if wrong else "\nno problems")
    return 1 if wrong else 0


def check_all() -> Iterator[Finding]:
    """Every finding; where a package is missing or another than it must be, nothing that needs it."""
    versions = check_versions()
    yield from versions
    if problems(versions):
        return
    yield from guarded("machine", lambda: importlib.import_module("qstar.doctor.machine").check_machine())
    yield from guarded("self-check", lambda: importlib.import_module("qstar.doctor.self_check").check_itself())


def guarded(what: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of ``check``, or the one that it fails."""
    try:
        return check()
    except Exception as error:  # whatever an import or a driver raises
        return [Finding("problem", what, f"it fails: {type(error).__name__}: {error}", ADVICE)]


def line_of(finding: Finding) -> str:
    """One line: the state, what it is about, the fact, and what to do."""
    advice = f" -> {finding.advice}" if finding.advice else ""
    return f"{finding.state:8}{finding.what:32}{finding.found}{advice}"
