"""``qstar star``: a model learns from those of its own rationales that reach the right answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from qstar.ancestors.question_files import read_question_file
from qstar.ancestors.rounds import REPORT_FILE
from qstar.ancestors.settings import StarSettings
from qstar.ancestors.star import DEFAULT, star
from qstar.ancestors.wording import Wording
from qstar.commands.flags import add_settings, taken


def run(arguments: list[str]) -> None:
    """Bootstrap rationales as the arguments say, and print the rounds."""
    parser = argparse.ArgumentParser(
        prog="qstar star",
        usage="qstar star MODEL --questions FILE [--held-out FILE] [--exemplars FILE] [--SETTING VALUE ...]",
        description="A model answers questions with rationales, learns from those that reach the right answer, and "
        "asks itself again, round after round (STaR, Zelikman et al., 2022).",
    )
    parser.add_argument("model", help="Hub name or folder, of a plain model or of one that thinks.")
    parser.add_argument(
        "--questions", type=Path, required=True, metavar="FILE", help="To train on: .jsonl or .json, with answers."
    )
    parser.add_argument("--held-out", type=Path, metavar="FILE", help="To measure each round on, and to stop by.")
    parser.add_argument("--exemplars", type=Path, metavar="FILE", help="Asked before each question, with rationales.")
    for name in ("question", "answer", "rationale"):
        parser.add_argument(
            f"--{name}-column", default=name, metavar="NAME", help=f"Of the files: the {name}s (default: {name})."
        )
    parser.add_argument("--output-dir", type=Path, default=DEFAULT, help=f"Folder for all of it (default: {DEFAULT}).")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in --output-dir.")
    add_settings(parser, StarSettings)
    add_settings(parser, Wording)
    options = vars(parser.parse_args(arguments))
    wording = taken(options, Wording)
    columns = tuple(options.pop(f"{name}_column") for name in ("question", "answer", "rationale"))
    for name in ("questions", "held_out", "exemplars"):
        path = options.pop(name)
        if path is not None:
            options[name] = read_question_file(path, *columns, needs_rationales=name == "exemplars")
    result = star(options.pop("model"), wording=wording, **options)
    print(f"\n{result.table()}\n\nround {result.best} saved in {result.folder}; more in {result.folder / REPORT_FILE}")
