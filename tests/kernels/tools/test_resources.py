"""Every kernel compiles for every card with every tile of the tables, fits, and spills nothing where it must not."""

import io
import json
import os
from dataclasses import asdict, replace
from importlib import import_module

import pytest

pytest.importorskip("triton")
resources = import_module("qstar_kernels.tools.resources")
launch = import_module("qstar_kernels.common.launch")

ATTENTION = resources.PROVIDERS["thought_attention"]
CASE = resources.Case("thought_attention", "forward", "sm_90", "bfloat16", 128, launch.Tile(128, 64, 8, 3))
GOOD = resources.Resources(registers=255, spilled=0, shared=232_448, products=("wgmma",))


def compiled_cases(architecture: str) -> list:
    """A tile that serves several widths at the largest only; odd widths on one card, every rule on two."""
    cases = list(resources.table_cases(architecture))
    if architecture == "sm_90":
        cases += [
            resources.find_case("thought_attention", kernel, architecture, dtype, width)
            for dtype in resources.DTYPES
            for width in (80, 96)
            for kernel in ATTENTION.KERNELS
        ]
    elif architecture != "gfx942":
        cases = [case for case in cases if not case.rules]
    if architecture == "sm_90":
        return cases
    return list({replace(case, width=0): case for case in cases}.values())


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("architecture", launch.TARGETS)
def test_every_tile_compiles_and_fits(architecture):
    cases = compiled_cases(architecture)
    measured = dict(resources.measure(cases, workers=2))
    assert measured.keys() == set(cases)
    assert [line for case, found in measured.items() for line in resources.complaints(case, found)] == []


@pytest.mark.parametrize(
    "case, found, complaint",
    [
        (CASE, GOOD, None),
        (CASE, replace(GOOD, spilled=8), "8 bytes of stack"),
        (replace(CASE, architecture="sm_100"), replace(GOOD, spilled=8), "8 bytes of stack"),
        (replace(CASE, architecture="sm_80"), replace(GOOD, spilled=8, shared=166_912, products=("mma.sync",)), None),
        (CASE, replace(GOOD, shared=232_449), "232449 bytes of shared memory, the card has 232448"),
        (replace(CASE, architecture="gfx942"), replace(GOOD, shared=65_537), "the card has 65536"),
        (CASE, replace(GOOD, products=("wgmma", "mma.sync")), "not by wgmma alone"),
        (CASE, replace(GOOD, products=("fma",)), "not by wgmma alone"),
        (CASE, replace(GOOD, products=()), None),
        (replace(CASE, dtype="float32"), replace(GOOD, products=("fma",)), None),
        (replace(CASE, dtype="float32"), replace(GOOD, spilled=8, products=("fma",)), "8 bytes of stack"),
        (CASE, resources.Resources(error="PassManager::run failed"), "PassManager::run failed"),
    ],
)
def test_what_is_wrong_is_told_with_the_case(case, found, complaint):
    lines = resources.complaints(case, found)
    assert len(lines) == (complaint is not None)
    if lines:
        assert lines[0].startswith(f"{case}: ") and complaint in lines[0]
        assert all(word in lines[0] for word in ("forward", case.architecture, case.dtype, "128x64, 8 warps, 3 stages"))


@pytest.mark.slow
@pytest.mark.compiles
def test_a_tile_that_does_not_compile_or_fit_is_found():
    small = replace(CASE, kernel="own_gradient", width=16)
    bad = [replace(small, tile=launch.Tile(48, 64, 4, 1)), replace(small, width=256, tile=launch.Tile(64, 64, 4, 2))]
    measured = dict(resources.measure(bad, workers=2))
    not_a_power, too_large = (resources.complaints(case, measured[case]) for case in bad)
    assert "power of 2" in not_a_power[0]
    assert "bytes of stack" in too_large[0]


def test_a_sum_over_lanes_that_is_contracted_with_a_product_is_found():
    lines = ["shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;", "\tmov.b32 %f3, %r2;", "fma.rn.f32 %f4, %f1, %f2, %f3;"]
    assert resources.contracted_sums("\n".join(lines)) == [lines[2]]
    assert not resources.contracted_sums("\n".join([*lines[:2], "add.f32 %f4, %f1, %f3;"]))
    assert "different bits" in resources.complaints(CASE, replace(GOOD, contracted=True))[0]


@pytest.mark.compiles
def test_lanes_that_share_a_sum_end_with_the_same_bits():
    """Where a lane holds one product alone: the rest of 16 that is left of a width of 80."""
    cases = [
        resources.find_case("thought_attention", kernel, "sm_90", "float32", 80, rules=True)
        for kernel in ("step", "query_gradient")
    ]
    for case, found in resources.measure(cases, workers=2):
        assert resources.complaints(case, found) == []


def test_a_compiler_that_dies_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(resources, "compile_case", lambda case: os._exit(134))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(CASE)) + "\n"))
    resources.serve(workers=2)
    case, found = json.loads(capsys.readouterr().out)
    assert resources.read_case(case) == CASE
    assert "exit code 134" in found["error"]


def test_the_table_replaces_what_is_between_the_marks_only(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{resources.MARKS[0]}\nold\n{resources.MARKS[1]}\nafter\n")
    resources.write_between_marks(path, resources.format_tables({CASE: GOOD}))
    text = path.read_text()
    assert text.startswith(f"before\n{resources.MARKS[0]}\n<det") and text.endswith(f"\n{resources.MARKS[1]}\nafter\n")
    assert "sm_90" in text and "old" not in text
    assert "| `forward` | bfloat16 | 128 | 128x64 w8 s3 | 255 | 0 | 232448 | wgmma |" in text
    path.write_text("no marks")
    with pytest.raises(SystemExit, match="must have the lines"):
        resources.write_between_marks(path, "table")
