"""The benchmarks' commands: those that the documents name are there, and each says in its help what it takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")]
SCRIPT, MODULE = re.compile(r"python (benchmarks/\w+\.py)"), re.compile(r"python -m (lab\.\w+)")
COMMANDS = sorted(
    {command for path in DOCUMENTS for form in (SCRIPT, MODULE) for command in form.findall(path.read_text())}
)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_documents_runs_where_they_say_and_prints_its_help(command):
    if command.endswith(".py"):
        arguments, folder = [command], ROOT
    else:
        arguments, folder = ["-m", command], ROOT / "benchmarks"
    done = subprocess.run([sys.executable, *arguments, "--help"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
