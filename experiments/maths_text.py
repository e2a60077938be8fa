"""Mathematical prose without a download: what the experiment with a real model was trained on.

    python experiments/maths_text.py maths.jsonl [--gsm8k train.jsonl]

The docstrings of sympy, mpmath and networkx, which PyTorch brings along, of at least 200 characters; with ``--gsm8k``
also the problems of that file with their solutions, one JSON object a line with ``question`` and ``answer``, as GSM8K
comes. Each text once, in an order by the hash of each: the same wherever the packages have the same versions.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from qstar.whole_file import write_whole

PACKAGES = ("sympy", "mpmath", "networkx")
SHORTEST = 200  # characters of a docstring
CALCULATIONS = re.compile(r"<<.*?>>")  # of a GSM8K solution, for a calculator
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(package: str) -> Iterator[str]:
    """The long docstrings of an installed package, but those of its tests.

    Raises:
        ValueError: it is not installed.
    """
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"{package} is not installed, whose docstrings are part of the text: pip install {package}")
    folder = Path(found.origin).parent
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.relative_to(folder).parts:
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # examples of another Python
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
            if text and len(text) >= SHORTEST:
                yield text


def problems(file: Path) -> Iterator[str]:
    """The problems of GSM8K's file with their solutions.

    Raises:
        ValueError: a line is not one of its problems.
    """
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            question, (solution, hashes, answer) = row["question"].strip(), row["answer"].partition("####")
        except (ValueError, KeyError, TypeError, AttributeError):
            hashes = ""
        if not hashes:
            raise ValueError(
                f"gsm8k is {str(file)!r}, whose line {number} is {line[:80]!r}, but it must be a JSON object with a "
                "question and an answer, whose number follows ####"
            )
        yield f"{question}\n{CALCULATIONS.sub('', solution).strip()}\nThe answer is {answer.strip()}."


def ordered(texts: set[str]) -> list[str]:
    """The texts by the hash of each."""
    return sorted(texts, key=lambda text: hashlib.sha256(("order" + text).encode()).digest())


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="The .jsonl file to write, a text in each line.")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's training split, as a file.")
    options = parser.parse_args(arguments)
    try:
        prose = {text for package in PACKAGES for text in docstrings(package)}
        solved = set(problems(options.gsm8k)) if options.gsm8k else set()
        write_whole(options.output, "".join(json.dumps({"text": text}) + "\n" for text in ordered(prose | solved)))
    except (ValueError, OSError) as refusal:
        parser.exit(2, f"error: {refusal}\n")
    print(f"{len(prose)} docstrings and {len(solved)} problems: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
