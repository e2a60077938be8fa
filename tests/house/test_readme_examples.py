"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
SECTION = "Use it in your own project"


def examples() -> list[str]:
    """The Python blocks of the section."""
    section = re.search(rf"^## {SECTION}\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)[1]
    return re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def test_there_are_three():
    assert len(examples()) == 3


@pytest.mark.parametrize("index", range(3), ids=["op", "transformers", "layer"])
def test_an_example_runs(index):
    exec(compile(examples()[index], f"README.md, example {index + 1}", "exec"), {"__name__": "__main__"})
