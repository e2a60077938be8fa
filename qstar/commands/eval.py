"""``qstar eval``: what a model gained by thinking, on tasks and on held-out text."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from qstar.commands.flags import add_columns, add_settings, any_model, taken, taken_columns
from qstar.config import CONFIG_FILE, QuietStarConfig
from qstar.data import DataSettings
from qstar.data.load import check_name
from qstar.embedded.sums import SUMS
from qstar.evaluation.harness import evaluate_with_harness, find_harness_tasks, harness_table
from qstar.evaluation.held_out import evaluate
from qstar.evaluation.plots import draw_report
from qstar.evaluation.record import write_report
from qstar.evaluation.report import TaskReport
from qstar.evaluation.run import TaskSettings, evaluate_tasks
from qstar.evaluation.store import model_identity
from qstar.evaluation.tables import evaluation_table, finite_or_none
from qstar.evaluation.tasks import TASKS, Task, find_task
from qstar.model import QuietStarModel
from qstar.wrapping import load_untrained

HELD_OUT = "held_out"
OF_HARNESS = ("include_path", "num_fewshot", "limit")
RESULTS = Path("runs", "eval")  # of models that are in no folder


def run(arguments: list[str]) -> None:
    """Evaluate as the arguments say, print tables and write all answers as JSON."""
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    name, tasks, harness = options.pop("model"), options.pop("tasks", None), options.pop("lm_eval", None)
    output = options.pop("output", None) or default_output(name)
    settings = taken(options, TaskSettings)
    of_harness = {each: options.pop(each) for each in OF_HARNESS if each in options}
    columns = taken_columns(options)
    asked, sources = named_tasks(tasks, columns)
    dataset = options.get("dataset")
    held_out = dataset is not None or HELD_OUT in (tasks or "").split(",")
    if not (asked or held_out or harness):
        parser.error("there is nothing to evaluate on: give --tasks, --dataset or --lm-eval")
    if held_out and dataset is None:
        parser.error(f"--tasks names {HELD_OUT}, but --dataset is not given")
    if of_harness and not harness:
        parser.error(f"--{next(iter(of_harness)).replace('_', '-')} is given, but --lm-eval is not")
    if dataset is not None:
        check_name(dataset, "dataset")
    harness_tasks = find_harness_tasks(harness.split(","), of_harness.pop("include_path", None)) if harness else None

    model, tokenizer = any_model(name)
    if held_out and not isinstance(model, QuietStarModel):
        raise ValueError(f"{name} never learned to think, so that there is nothing to compare on held-out text")
    reports: tuple[TaskReport, ...] = ()
    more: dict[str, Any] = {}
    if asked:
        identity = model_identity(name, getattr(model.config, "_commit_hash", None))
        reports = evaluate_tasks(
            model,
            tokenizer,
            asked,
            sources=sources,
            untrained=untrained(name, tokenizer) if settings.controls else None,
            folder=output.with_suffix("") / "answers",
            identity=identity,
            **asdict(settings),
        )
        more["model"] = identity
        for report in reports:
            print(f"{report.table()}\n")
            print(draw_report(report, output.with_suffix("") / f"{report.task}.svg"))
    shared: dict[str, Any] = dict(
        batch_size=settings.batch_size, temperature=settings.thought_temperature, seed=settings.seed
    )
    if held_out:
        result = evaluate(cast(Any, model), tokenizer, **options, **shared)
        print(evaluation_table(result))
        more[HELD_OUT] = {"dataset": dataset, **result.summary(), **asdict(result)}
    if harness_tasks:
        found = evaluate_with_harness(model, tokenizer, harness_tasks, **of_harness, **shared)
        print(harness_table(found))
        more["lm_eval"] = found
    output.parent.mkdir(parents=True, exist_ok=True)
    if asked or harness:
        write_report(output, reports, command=shlex.join(["qstar", "eval", *arguments]), seed=settings.seed, **more)
    else:
        output.write_text(json.dumps(finite_or_none(more[HELD_OUT]), indent=2, allow_nan=False) + "\n")
    print(f"written to {output}")


def make_parser() -> argparse.ArgumentParser:
    """All flags, those of :class:`DataSettings` for held-out text among them."""
    parser = HfArgumentParser(
        cast(Any, DataSettings),
        prog="qstar eval",
        description="What a model gained by thinking: answers to tasks, and the likelihood of held-out text, with and "
        "without thoughts, and with others in their place.",
    )
    parser.add_argument("model", help="What `qstar train` wrote; or any causal language model, a folder or a hub name.")
    built_in = ", ".join([*(task.name for task in TASKS), SUMS.name, HELD_OUT])
    parser.add_argument(
        "--tasks",
        help=f"Of {built_in}, or files of questions, with commas between them; gsm8k=FILE reads its questions there.",
    )
    add_columns(parser)
    parser.add_argument("--dataset", help="Held-out text: hub name, folder, or .txt, .jsonl, .json or .parquet file.")
    parser.add_argument("--split", default="test", help="Split of a hub dataset of held-out text.")
    parser.add_argument("--max-rows", type=int, help="Stop after so many rows of held-out text.")
    parser.add_argument("--lm-eval", help="Tasks of lm-evaluation-harness, with commas between them.")
    parser.add_argument("--include-path", type=Path, help="A folder with further tasks for --lm-eval.")
    parser.add_argument("--num-fewshot", type=int, help="Solved examples before each question of --lm-eval.")
    parser.add_argument("--limit", type=int, help="Questions of each task of --lm-eval.")
    parser.add_argument(
        "--output", type=Path, help="Where to write the results, as JSON; FOLDER/eval.json if not given."
    )
    add_settings(parser, TaskSettings)
    for action in parser._actions:
        if action.default is None:
            action.default = argparse.SUPPRESS  # no default to show
    return parser


def default_output(name: str) -> Path:
    """In the model's folder; for a model of the hub in ``RESULTS``."""
    return Path(name) / "eval.json" if Path(name).is_dir() else RESULTS / f"{name.replace('/', '--')}.json"


def named_tasks(names: str | None, columns: dict[str, str]) -> tuple[list[Task], dict[str, str]]:
    """Tasks and sources out of ``gsm8k=test.jsonl,my.jsonl``.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a task does not exist, or two have one name; columns are given, but no file.
    """
    tasks: list[Task] = []
    sources: dict[str, str] = {}
    for each in filter(None, (names or "").split(",")):
        name, _, source = each.partition("=")
        if name == HELD_OUT:
            continue
        task = SUMS if name == SUMS.name else find_task(name, **columns)
        if task.name in {other.name for other in tasks}:
            raise ValueError(f"tasks name {task.name!r} twice")
        tasks.append(task)
        if source:
            sources[task.name] = source
    if columns and not tasks:
        raise ValueError(f"{next(iter(columns))} is given, but tasks name no file of questions")
    return tasks, sources


def untrained(name: str, tokenizer: PreTrainedTokenizerBase) -> Callable[[], PreTrainedModel] | None:
    """What loads the model as it was before training; None, and a line that says why, where that cannot be."""
    if not (Path(name) / CONFIG_FILE).is_file():
        return None
    base = QuietStarConfig.load(name).base_model
    if base is None or (Path(base).is_absolute() and not Path(base).is_dir()):
        why = "the folder does not name it" if base is None else f"{base} is not there"
        print(f"no rows of the model before training: {why}\n")
        return None
    return partial(load_untrained, name, tokenizer)
