"""The text of the experiment with a real model: which documents it holds, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json

import pytest

import maths_text

LONG = "Computes the sum of two numbers. " + "It adds the first to the second. " * 6


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with long and short docstrings, tests, and a file that does not parse."""
    folder = tmp_path / "prose"
    (folder / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text(f'"""{LONG}module"""\n\ndef f():\n    """Short."""\n')
    (folder / "sums.py").write_text(
        f'class Sum:\n    """{LONG}class"""\n    async def g(self):\n        """{LONG}module"""\n'
    )
    (folder / "tests" / "test_sums.py").write_text(f'"""{LONG}test"""\n')
    (folder / "broken.py").write_text("print 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(maths_text, "PACKAGES", ("prose",))


@pytest.fixture
def gsm8k(tmp_path):
    row = {"question": "2\u2028and 3?", "answer": "It is 2+3=<<2+3=5>>5.\n#### 5"}
    path = tmp_path / "train.jsonl"
    path.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 2, encoding="utf-8")
    return path


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_each_long_docstring_and_each_problem_stand_there_once_by_their_hash(package, gsm8k, tmp_path, capsys):
    path = tmp_path / "maths.jsonl"
    assert maths_text.main([str(path), "--gsm8k", str(gsm8k)]) == 0
    expected = {f"{LONG}module", f"{LONG}class", "2\u2028and 3?\nIt is 2+3=5.\nThe answer is 5."}
    assert texts(path) == sorted(expected, key=lambda text: hashlib.sha256(f"order{text}".encode()).hexdigest())
    assert capsys.readouterr().out == f"2 docstrings and 1 problems: {path}\n"
    maths_text.main([str(path)])
    assert len(texts(path)) == 2


@pytest.mark.parametrize(
    "line",
    ["{", "[1]", '{"question": "2?"}', '{"question": "2?", "answer": "5"}', '{"question": null, "answer": "#### 5"}'],
)
def test_a_file_of_another_kind_is_refused_and_nothing_is_written(package, tmp_path, capsys, line):
    file = tmp_path / "other.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(SystemExit) as stopped:
        maths_text.main([str(tmp_path / "maths.jsonl"), "--gsm8k", str(file)])
    assert stopped.value.code == 2 and not (tmp_path / "maths.jsonl").exists()
    assert f"gsm8k is {str(file)!r}, whose line 1 is {line!r}, but it must be" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(maths_text, "PACKAGES", ("no_such_package",))
    with pytest.raises(SystemExit):
        maths_text.main([str(tmp_path / "maths.jsonl")])
    assert "no_such_package is not installed" in capsys.readouterr().err


def test_what_pytorch_brings_along_is_prose():
    found = list(maths_text.docstrings("mpmath"))
    assert len(found) > 100 and all(len(text) >= maths_text.SHORTEST for text in found)
