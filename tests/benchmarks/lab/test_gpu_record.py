"""The record of a run of tests: how each ended, and in which a GPU took part."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.gpu_stages import Room, read_checks

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_two_shares_of_the_tests_say_how_each_ended_and_whether_on_the_gpu(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from lab import gpu_record\nMADE = [0]\ngpu_record.allocations = lambda: MADE[0]\n"
    )
    (tmp_path / "test_several.py").write_text(
        "import pytest\nfrom conftest import MADE\n\n"
        "@pytest.fixture\ndef broken():\n    raise OSError('no fixture')\n\n"
        "def test_on_gpu():\n    MADE[0] += 1\n\n"
        "def test_on_cpu():\n    pass\n\n"
        "def test_wrong_on_gpu():\n    MADE[0] += 1\n    assert 1 == 2, 'not equal'\n\n"
        "def test_not_here():\n    pytest.skip('why')\n\n"
        "def test_of_a_fixture(broken):\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    for share in range(2):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "lab.gpu_record", "."]
        options = ["--record", f"tests-{share}.json", "--share", f"{share}/2"]
        subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True)
    found = read_checks(Room(tmp_path, tmp_path, 1.0), [])
    failures = found.pop("failures")
    assert found == {"chosen": 5, "passed": 2, "failed": 2, "skipped": 1, "on_gpu": 2}
    assert failures == {
        "test_several.py::test_wrong_on_gpu": "AssertionError: not equal",
        "test_several.py::test_of_a_fixture": "OSError: no fixture",
    }
