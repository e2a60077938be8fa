"""Versions of Python and of the packages that are required, beside those that are meant to work and those tested."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import qstar
from qstar.doctor.findings import Finding

OURS = "quiet-star"
SHOWN = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
)  # the others where something is to be said of them
CONSTRAINTS = Path(qstar.__file__).parents[1] / "constraints.txt"  # of a checkout


def check_versions() -> list[Finding]:
    """Of Python, this package and what it requires."""
    try:
        needed = metadata(OURS)
    except PackageNotFoundError:
        advice = "pip install -c constraints.txt -e . in its checkout"
        return [Finding("note", OURS, f"{qstar.__version__}, not installed: no range of versions is known", advice)]
    tested = pins(CONSTRAINTS.read_text()) if CONSTRAINTS.is_file() else {}
    return [
        python_finding(platform.python_version(), SpecifierSet(needed["Requires-Python"])),
        Finding("ok", OURS, qstar.__version__),
        *package_findings(map(Requirement, needed.get_all("Requires-Dist") or []), installed_version, tested),
    ]


def installed_version(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pins(text: str) -> dict[str, str]:
    """The version of each distribution in a file of constraints."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    pinned = [line.split("==") for line in lines if "==" in line]
    return {canonicalize_name(name): number for name, number in pinned}


def python_finding(number: str, wanted: SpecifierSet) -> Finding:
    """Of the version of Python."""
    if not wanted.contains(number, prereleases=True):
        return Finding("problem", "python", f"{number} is not {wanted}", f"use Python {wanted}")
    return Finding("ok", "python", f"{number} is {wanted}")


def package_findings(
    required: Iterable[Requirement], installed: Callable[[str], str | None], tested: Mapping[str, str]
) -> list[Finding]:
    """Of packages.

    Args:
        required: what must be there; what only an extra needs is left out.
        installed: the version by name, None where there is none.
        tested: versions that the tests pass with, by canonical name, as far as they are known.
    """
    findings, usual = [], []
    for each in required:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(each.name)
        finding = package_finding(each, installed(each.name), tested.get(name))
        if name in SHOWN or finding.state != "ok":
            findings.append(finding)
        else:
            usual.append(name)
    findings.sort(key=lambda x: SHOWN.index(x.what) if x.what in SHOWN else len(SHOWN))
    if usual:
        findings.append(Finding("ok", "other packages", ", ".join(usual)))
    return findings


def package_finding(required: Requirement, number: str | None, tested: str | None) -> Finding:
    """Of one package, in the version ``number``."""
    name, wanted = canonicalize_name(required.name), f"{required.name}{required.specifier}"
    if number is None:
        return Finding("problem", name, "not installed", f"pip install '{wanted}'")
    if not required.specifier.contains(number, prereleases=True):
        return Finding("problem", name, f"{number} is not {required.specifier}", f"pip install '{wanted}'")
    if tested is None:
        return Finding("ok", name, f"{number} is {required.specifier}")
    if Version(number).public == Version(tested).public:
        return Finding("ok", name, f"{number}, as tested")
    return Finding("note", name, f"{number} is {required.specifier}, but {tested} is what the tests pass with")
