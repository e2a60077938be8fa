"""The Python examples of the README and of docs/ run as they stand."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTION = "Use it in your own project"  # of the README; its other examples need a hub, or hours
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def examples() -> dict[str, str]:
    """The blocks of the README's section and of every page, by page and number."""
    section = re.search(rf"^## {SECTION}\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    pages = {"README.md": section, **{f"docs/{page.name}": page.read_text() for page in PAGES}}
    return {
        f"{name}, example {number}": block
        for name, text in pages.items()
        for number, block in enumerate(blocks(text), 1)
    }


def test_the_readme_and_the_page_of_ops_have_examples():
    pages = [name.split(",")[0] for name in examples()]
    assert "README.md" in pages
    assert pages.count("docs/ops.md") == 11


@pytest.mark.parametrize("name", examples())
def test_an_example_runs(name):
    exec(compile(examples()[name], name, "exec"), {"__name__": "__main__"})
