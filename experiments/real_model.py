"""Train a real model on mathematical text in several ways, and compare what each predicts of text and of answers.

    python experiments/real_model.py --model M --dataset TEXT --tasks gsm8k=FILE --output-dir D

``experiments/README.md`` says what is compared, how long it takes and what it needs.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from common.deadline import Deadline, OutOfTime
from common.folders import keep_settings, read_json
from qstar.commands.flags import add_settings, taken
from qstar.model import QuietStarModel
from qstar.training.folders import alone_in
from real.evaluate import TEXT_RECORD, evaluate_task, evaluate_text, task_file
from real.settings import BASE, VARIANTS, RealModelSettings
from real.sources import Sources
from real.summary import summarize
from real.train import MODEL_FOLDER, TRAINING_FILE, train_variant


class Job:
    """A variant with one seed, or the base, in a folder of its own: what of it is not there yet is done."""

    def __init__(self, output: Path, name: str, seed: int | None, sources: Sources):
        self.name, self.seed, self.sources = name, seed, sources
        self.output, self.folder = output, output / (name if seed is None else f"{name}-{seed}")
        self.variant = None if seed is None else VARIANTS[name]
        self.model: QuietStarModel | None = None

    def missing(self) -> list[str]:
        """The files that are not there whole, in the order in which they are made."""
        files = [] if self.seed is None else [TRAINING_FILE]
        files += [TEXT_RECORD, *(task_file(self.folder, task).name for task in self.sources.tasks)]
        return [name for name in files if not (self.folder / name).exists()]

    def run(self, checkpoint_steps: int, deadline: Deadline) -> None:
        """Make what is missing.

        Raises:
            OutOfTime: not all of it can be made.
            BlockingIOError: another process is at it.
        """
        with alone_in(self.folder):
            for file in self.missing():
                goes_on = file == TRAINING_FILE and checkpoint_steps  # another time, from where it stops
                deadline.check(f"{file} of {self.folder.name}", 0.0 if goes_on else self.expected(file))
                print(f"{self.folder.name}: {file}", flush=True)
                if file == TRAINING_FILE:
                    assert self.seed is not None
                    options: dict[str, Any] = dict(checkpoint_steps=checkpoint_steps, deadline=deadline)
                    train_variant(self.folder, self.name, self.seed, self.sources, **options)
                elif file == TEXT_RECORD:
                    evaluate_text(self.folder, self.opened(), self.variant, self.sources)
                else:
                    self.ask(file)
        self.model = None

    def ask(self, file: str) -> None:
        """Ask the questions of the task whose answers belong into ``file``."""
        [task] = [each for each in self.sources.tasks if task_file(self.folder, each).name == file]
        saved = None if self.seed is None else self.folder / MODEL_FOLDER
        evaluate_task(self.folder, self.opened(), self.variant, task, self.sources, saved)

    def opened(self) -> QuietStarModel:
        """The model, read when it is evaluated first."""
        if self.model is None:
            if self.seed is None:
                self.model = self.sources.placed(self.sources.base())
            else:
                self.model = self.sources.trained(self.folder / MODEL_FOLDER)
        return self.model

    def expected(self, file: str) -> float:
        """Seconds that a file took with another seed; 0 where none is there."""
        others = (each / file for each in self.output.glob(f"{self.name}-*"))
        return max((float(read_json(each)["seconds"]) for each in others if each.exists()), default=0.0)


def jobs_of(output: Path, variants: list[str], seeds: list[int], sources: Sources) -> list[Job]:
    """All that is to be done: the base, then the variants of one seed after the other."""
    trained = [Job(output, name, seed, sources) for seed in seeds for name in variants if name != BASE]
    return [Job(output, BASE, None, sources), *trained]


def work(jobs: list[Job], checkpoint_steps: int, deadline: Deadline) -> None:
    """Do the jobs that nobody is at."""
    for job in jobs:
        if not job.missing():
            continue
        try:
            job.run(checkpoint_steps, deadline)
        except BlockingIOError:
            print(f"{job.folder.name}: another process is at it", flush=True)
        except OutOfTime as stopped:
            print(f"out of time: {stopped}", flush=True)
        job.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # for the processes beside this one


def build_parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hub name or folder of the base.")
    parser.add_argument(
        "--dataset", required=True, help="Mathematical text: hub name or file, read as qstar train does."
    )
    parser.add_argument("--tasks", default="gsm8k", help="Tasks, with their files, as of qstar eval.")
    parser.add_argument("--output-dir", type=Path, required=True, help="Where the results lie, and those before.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Of the training.")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="To train.")
    parser.add_argument("--time-limit", type=float, help="Seconds, in which nothing is begun that cannot end.")
    parser.add_argument(
        "--checkpoint-steps", type=int, default=25, help="Write a checkpoint every so many steps; 0 for none. (25)"
    )
    parser.add_argument("--threads", type=int, help="Of the CPU.")
    parser.add_argument("--summarize", action="store_true", help="Only write the summary of what is there.")
    add_settings(parser, RealModelSettings)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing in the folder, and sum up what is there."""
    options = vars(build_parser().parse_args(arguments))
    settings = taken(options, RealModelSettings)
    deadline, output = Deadline(options["time_limit"]), options["output_dir"]
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    logging.set_verbosity_error()
    sources = Sources(options["model"], options["dataset"], options["tasks"], settings)
    named = {name: options[name] for name in ("model", "dataset", "tasks")}
    keep_settings(output, named | settings.as_json())
    if not options["summarize"]:
        work(jobs_of(output, options["variants"], options["seeds"], sources), options["checkpoint_steps"], deadline)
    print(summarize(output, [task.name for task in sources.tasks]))


if __name__ == "__main__":
    main()
