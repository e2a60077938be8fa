"""Versions: what is missing or out of range is a problem, what is not tested a note."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from qstar.doctor import versions
from qstar.doctor.findings import Finding
from qstar.doctor.versions import check_versions, package_finding, package_findings, pins, python_finding

ROOT = Path(__file__).resolve().parents[3]
TORCH = Requirement("torch>=2.11")


@pytest.mark.parametrize(
    ("number", "tested", "expected"),
    [
        ("2.13.0", "2.13.0", Finding("ok", "torch", "2.13.0, as tested")),
        ("2.13.0+cu130", "2.13.0", Finding("ok", "torch", "2.13.0+cu130, as tested")),
        ("2.13.0", None, Finding("ok", "torch", "2.13.0 is >=2.11")),
        (
            "2.14.0",
            "2.13.0",
            Finding("note", "torch", "2.14.0 is >=2.11, but 2.13.0 is what the tests pass with"),
        ),
        ("2.10.1", "2.13.0", Finding("problem", "torch", "2.10.1 is not >=2.11", "pip install 'torch>=2.11'")),
        (None, "2.13.0", Finding("problem", "torch", "not installed", "pip install 'torch>=2.11'")),
    ],
)
def test_a_version_is_compared_with_the_range_and_with_what_is_tested(number, tested, expected):
    assert package_finding(TORCH, number, tested) == expected


def test_python_is_compared_with_its_range():
    wanted = SpecifierSet(">=3.11")
    assert python_finding("3.11.0", wanted) == Finding("ok", "python", "3.11.0 is >=3.11")
    old = Finding("problem", "python", "3.10.9 is not >=3.11", "use Python >=3.11")
    assert python_finding("3.10.9", wanted) == old


def test_what_only_an_extra_or_another_system_needs_is_left_out():
    lines = ["pytest>=8; extra == 'test'", "pywin32>=1; sys_platform == 'never'", "einops>=0.8", "tqdm>=4", "torch>=2"]
    found = package_findings(map(Requirement, lines), {"einops": "0.9", "torch": "2.1", "tqdm": "3"}.get, {})
    assert found == [
        Finding("ok", "torch", "2.1 is >=2"),
        Finding("problem", "tqdm", "3 is not >=4", "pip install 'tqdm>=4'"),
        Finding("ok", "other packages", "einops"),
    ]


def test_every_requirement_is_looked_at():
    """With the tested versions all is well; without a package it is named."""
    tested = pins((ROOT / "constraints.txt").read_text())
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required = [Requirement(line) for line in lines]
    names = {canonicalize_name(each.name) for each in required}
    found = package_findings(required, lambda name: tested[canonicalize_name(name)], tested)
    assert {each.state for each in found} == {"ok"}
    shown = [each.what for each in found[:-1]]
    assert shown == list(versions.SHOWN)
    assert {*shown, *found[-1].found.split(", ")} == names
    for name in names:
        left = {other: number for other, number in tested.items() if other != name}
        missing = package_findings(required, lambda x, left=left: left.get(canonicalize_name(x)), tested)
        assert [each.what for each in missing if each.state == "problem"] == [name]


def test_the_versions_here_are_found():
    found = {each.what: each for each in check_versions()}
    assert {"python", "quiet-star", *versions.SHOWN} <= found.keys()
    assert found["torch"].found.startswith(versions.installed_version("torch"))


def test_a_package_that_is_not_installed_has_no_range(monkeypatch):
    monkeypatch.setattr(versions, "OURS", "no-such-distribution")
    [finding] = check_versions()
    assert (finding.state, finding.what) == ("note", "no-such-distribution")
    assert "not installed" in finding.found and finding.advice.startswith("pip install")


def test_a_problem_has_advice_and_a_state_is_known():
    with pytest.raises(ValueError, match="torch is a problem, but there is no advice"):
        Finding("problem", "torch", "not installed")
    with pytest.raises(ValueError, match="state is 'bad', but it must be one of 'ok', 'note', 'problem'"):
        Finding("bad", "torch", "not installed")
