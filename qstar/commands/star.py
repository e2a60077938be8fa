"""``qstar star``: a model learns from those of its own rationales that reach the right answer."""

from __future__ import annotations

import argparse
from pathlib import Path

from qstar.ancestors.rounds import REPORT_FILE
from qstar.ancestors.settings import StarSettings
from qstar.ancestors.star import DEFAULT, star
from qstar.ancestors.wording import Wording
from qstar.commands.flags import add_columns, add_settings, taken, taken_columns
from qstar.evaluation.exemplars import read_exemplars
from qstar.evaluation.questions import read_questions
from qstar.evaluation.tasks import find_task


def run(arguments: list[str]) -> None:
    """Bootstrap rationales as the arguments say, and print the rounds."""
    parser = argparse.ArgumentParser(
        prog="qstar star",
        usage="qstar star MODEL --task NAME[=FILE] [--held-out FILE] [--exemplars N] [--SETTING VALUE ...]",
        description="A model answers questions with rationales, learns from those that reach the right answer, and "
        "asks itself again, round after round (STaR, Zelikman et al., 2022).",
    )
    parser.add_argument("model", help="Hub name or folder, of a plain model or of one that thinks.")
    parser.add_argument(
        "--task",
        required=True,
        metavar="NAME",
        help="Questions to train on: a task of `qstar eval`, gsm8k=FILE with its questions there, or a file.",
    )
    parser.add_argument("--split", default="train", help="Of the task's data set on the hub (default: train).")
    parser.add_argument("--max-questions", type=int, help="Draw so many of them.")
    parser.add_argument("--held-out", metavar="FILE", help="Further ones, to measure each round on, and to stop by.")
    parser.add_argument("--exemplars", type=int, default=0, metavar="N", help="Show so many before each question.")
    parser.add_argument("--exemplar-file", metavar="FILE", help="With rationales, in the place of ours.")
    add_columns(parser)
    parser.add_argument("--output-dir", type=Path, default=DEFAULT, help=f"Folder for all of it (default: {DEFAULT}).")
    parser.add_argument("--resume", action="store_true", help="Go on with the run in --output-dir.")
    add_settings(parser, StarSettings)
    add_settings(parser, Wording)
    options = vars(parser.parse_args(arguments))
    wording = taken(options, Wording)
    columns = taken_columns(options)
    name, _, source = options.pop("task").partition("=")
    task = find_task(name, **columns)
    split, count = options.pop("split"), options.pop("max_questions")
    in_a_file = source or Path(name).is_file()
    questions = read_questions(
        task,
        source or None,
        split=None if in_a_file else split,
        max_questions=count,
        seed=options.get("seed", 0),
    )
    held_out, shown, exemplar_file = (options.pop(each) for each in ("held_out", "exemplars", "exemplar_file"))
    if exemplar_file is not None and not shown:
        parser.error("--exemplar-file is given, but --exemplars is 0: none of them would be shown")
    exemplars = read_exemplars(task, exemplar_file)[:shown] if shown else ()
    if len(exemplars) < shown:
        parser.error(f"--exemplars is {shown}, but there are {len(exemplars)}")
    if held_out is not None:
        options["held_out"] = read_questions(task, held_out)
    model = options.pop("model")
    result = star(model, questions, exemplars=exemplars, wording=wording, is_right=task.is_right, **options)
    print(f"\n{result.table()}\n\nround {result.best} saved in {result.folder}; more in {result.folder / REPORT_FILE}")
