"""One model of an experiment: a copy of a task's decoder, trained in one way and asked on problems it has not seen."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from common.ability import note_ability
from common.answers import NO_THOUGHTS, OWN_THOUGHTS, Answers, Exam
from common.deadline import Deadline
from common.operations import equal_steps
from common.results import result_of
from qstar.cpu import keep_freed_memory, one_thread
from qstar.data import pack
from qstar.embedded.pretrain import pretrained_model
from qstar.embedded.run import CACHE, PlainTrainer
from qstar.evaluation.scoring import OWN
from qstar.model import QuietStarModel
from qstar.training.settings import UNSEEN, QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import wrap
from tasks.every import TASKS
from tasks.task import Task

BASE, THINK, PAUSE, PLAIN, OPERATIONS = "base", "think", "pause", "plain", "plain-equal-operations"
KINDS = (BASE, THINK, PAUSE, PLAIN, OPERATIONS)
TRAINING: dict[str, Any] = UNSEEN | dict(
    learning_rate=5e-4,
    mixing_head_lr_factor=6.0,
    thought_embedding_lr_factor=1.0,
    per_device_train_batch_size=12,
    warmup_steps=0,
    weight_decay=0.0,
    logging_steps=10,
    gradient_norm_steps=0,
    max_grid_tokens=0,
    save_strategy="no",
    curves=False,
    disable_tqdm=True,
    report_to="none",
)
LOGGED = ("nll_base", "nll_talk", "reward", "mixing_weight", "thought_entropy", "distinct_thoughts")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done, and all that its result depends on.

    Attributes:
        task: of the problems.
        seed: of the decoder, of the problems and of the training.
        name: of the result.
        kind: one of ``KINDS``: the decoder as it is; taught to think; taught with pauses in the place of thoughts;
            trained on the same text without thoughts; and so for as many multiply-adds as thinking takes.
        split: of the problems that are asked: "validation" to choose settings, "test" for what is reported.
        problems: how many are asked.
        thoughts: settings of :class:`qstar.config.ThoughtSettings`.
        training: settings of :class:`qstar.training.settings.QuietStarArguments`.
    """

    task: str
    seed: int
    name: str
    kind: str
    split: str
    problems: int
    thoughts: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}, but it must be one of {', '.join(map(repr, KINDS))}")

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, those of the task as well."""
        made = dict(thoughts=self.all_thoughts, training=self.all_training)
        return asdict(self) | made | dict(pretraining=asdict(TASKS[self.task].pretraining))

    @property
    def all_thoughts(self) -> dict[str, Any]:
        task = TASKS[self.task]
        sizes = dict(thought_tokens=task.thought_tokens, ahead_tokens=1, rationales=2)
        return sizes | dict(start_init=task.marker, end_init=task.close) | self.thoughts

    @property
    def all_training(self) -> dict[str, Any]:
        return TRAINING | TASKS[self.task].training | self.training

    @one_thread()
    def result(self) -> dict[str, Any]:
        """Do it: the rows of answers, and what the training took."""
        disable_progress_bars()
        keep_freed_memory()
        task = TASKS[self.task]
        decoder, tokenizer = pretrained(task, self.seed)
        exam = Exam(task, tokenizer, task.problems(self.problems, self.seed, self.split), self.seed)
        model = self._wrapped(decoder, tokenizer)
        found: dict[str, Any] = dict(problem_steps=[each.steps for each in exam.problems])
        if self.kind == BASE:
            rows = {NO_THOUGHTS: exam.answers(model, None)}
        else:
            untrained = copy.deepcopy(model)
            found |= self._train(model, tokenizer)
            rows = self._rows(exam, model, untrained)
        return found | dict(rows={name: _record(exam, answers) for name, answers in rows.items()})

    def _wrapped(self, decoder: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> QuietStarModel:
        """The decoder, able to think."""
        pauses = dict(pauses=True, rationales=1) if self.kind == PAUSE else {}
        return wrap(decoder, tokenizer, **(self.all_thoughts | pauses))

    def _rows(self, exam: Exam, model: QuietStarModel, untrained: QuietStarModel) -> dict[str, Answers]:
        if self.kind == THINK:
            return exam.with_thoughts(model, untrained)
        rows = {NO_THOUGHTS: exam.answers(model, None)}
        return rows | {OWN_THOUGHTS: exam.answers(model, OWN)} if self.kind == PAUSE else rows

    def _train(self, model: QuietStarModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
        """Train ``model`` on problems with their answers; no working is shown."""
        task, settings = TASKS[self.task], self.all_training
        rows, length = settings["per_device_train_batch_size"], settings["seq_length"]
        if self.kind == OPERATIONS:
            sizes = dict(rows=rows, plain_rows=rows, length=length, positions=settings.get("positions_per_row"))
            settings = settings | dict(max_steps=equal_steps(model, steps=settings["max_steps"], **sizes))
        with tempfile.TemporaryDirectory() as folder:
            args = QuietStarArguments(output_dir=folder, seed=self.seed, **settings)
            set_seed(args.seed)
            tokens = args.max_steps * rows * length
            shortest = min(len(text.split()) + 1 for text in task.answered(100, self.seed))
            texts = Dataset.from_dict({args.text_column: task.answered(tokens // shortest + 1, self.seed)})
            packed = pack(texts, tokenizer, args.seq_length, args.text_column)
            kind = PlainTrainer if self.kind in (PLAIN, OPERATIONS) else QuietStarTrainer
            trainer = kind(model, args, train_dataset=packed, processing_class=tokenizer)
            seconds = trainer.train().metrics["train_runtime"]
        log = [
            dict(step=record["step"]) | {name: record[name] for name in LOGGED if name in record}
            for record in trainer.state.log_history
            if "loss" in record
        ]
        return dict(steps=args.max_steps, training_seconds=seconds, log=log)


def pretrained(task: Task, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The decoder of a task, and its tokenizer: from the cache, or pre-trained now."""
    tokenizer = task.tokenizer()
    asked = task.problems(task.pretraining.tried, seed, "validation")
    measure = partial(note_ability, task=task, tokenizer=tokenizer, asked=asked)
    return pretrained_model(CACHE, seed, task.pretraining, task.documents, tokenizer, measure)


def run_jobs(jobs: Iterable[Job], folder: Path, deadline: Deadline, processes: int = 1) -> int:
    """Do what has no result in ``folder`` yet: first a job of each seed, which makes its decoder, then all others.

    Args:
        jobs: what there is to do.
        folder: holds a folder of results for each seed.
        deadline: after which no job is begun any more.
        processes: jobs that are worked on at a time.

    Returns:
        How many jobs are left.

    Raises:
        ValueError: a result that is there is of other settings.
    """
    by_seed = [list(each) for _, each in groupby(sorted(jobs, key=lambda job: job.seed), key=lambda job: job.seed)]
    stages = [first for first, *_ in by_seed], [job for _, *others in by_seed for job in others]
    work = partial(_do, folder=folder, deadline=deadline)
    if processes == 1:
        return sum(sum(map(work, stage)) for stage in stages)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return sum(sum(pool.map(work, stage)) for stage in stages)


def result_path(folder: Path, seed: int, name: str) -> Path:
    """Where the result of a job lies."""
    return folder / f"seed-{seed}" / f"{name}.json"


def _do(job: Job, folder: Path, deadline: Deadline) -> bool:
    """Whether it is left, for want of time."""
    command = parent_process()
    if deadline.left() <= 0 or (command is not None and not command.is_alive()):  # it was killed
        return True
    found = result_of(result_path(folder, job.seed, job.name), job.settings, job.result)
    rows = found["result"]["rows"]
    told = ", ".join(f"{name} {row['right'].count('1') / len(row['right']):.1%}" for name, row in rows.items())
    print(f"{job.task}, seed {job.seed}, {job.name} ({found['seconds']:.0f} s): {told}", flush=True)
    return False


def _record(exam: Exam, answers: Answers) -> dict[str, Any]:
    """Answers as JSON can say them; right and wrong as a text of 1 and 0."""
    written = exam.written(answers)
    found = dict(right=_bits(answers.right), log_prob=answers.log_prob)
    if answers.thoughts is None or written is None:
        return found
    return found | dict(written=_bits(written), tokens=answers.thoughts[0].shape[1])


def _bits(values: list[bool]) -> str:
    return "".join("1" if value else "0" for value in values)
