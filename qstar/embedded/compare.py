"""Quiet-STaR beside its ancestors on the built-in task: one base, the same problems and answers, one table.

The base can write some workings, but not all. All that is trained sees the same problems with their answers, and no
working: what needs one must write it itself.
"""

from __future__ import annotations

import copy
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from qstar.ancestors.star import BEGUN_FILE, StarResult, star
from qstar.ancestors.wording import Wording
from qstar.config import check_names, setting, setting_names
from qstar.cpu import one_thread
from qstar.data import pack
from qstar.embedded.comparison_plot import PLOT_FILE, draw_comparison
from qstar.embedded.pretrain import PretrainSettings, pretrained_model
from qstar.embedded.run import CACHE, SETTINGS, SIZES, PlainTrainer
from qstar.embedded.sums import SUMS
from qstar.embedded.task import EQUALS, QUESTION, SPLITS, WORKING, documents_with_hints
from qstar.evaluation.direct import answer_directly
from qstar.evaluation.questions import read_questions
from qstar.evaluation.reasoning import ReasoningSettings, reason
from qstar.evaluation.record import write_report
from qstar.evaluation.report import ACCURACY, Answered, Row, TaskReport, percent
from qstar.evaluation.scoring import OWN, Thoughts
from qstar.evaluation.tables import table
from qstar.model import QuietStarModel
from qstar.training.curves import can_draw
from qstar.training.folders import alone_in
from qstar.training.settings import UNSEEN, QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import wrap

DEFAULT = Path("runs/compare")
REPORT_FILE = "report.json"
BASE = PretrainSettings(check_steps=5, goal=0.3)  # stops where it writes about a third of the workings
WORDING = Wording(
    prompt=f"{QUESTION} {{question}} {EQUALS} {WORKING}",
    hinted_prompt=f"{WORKING} {{answer}} {QUESTION} {{question}} {EQUALS} {WORKING}",
    exemplar=" {rationale} = {answer} ",
    answer_pattern=rf"{EQUALS} (\d)",
    stop=(),
)
TRAINING: dict[str, Any] = SETTINGS | UNSEEN | dict(logging_steps=50, curves=False)
STAR: dict[str, Any] = dict(
    patience=5, learning_rate=1e-3, warmup_steps=10, train_batch_size=32, max_new_tokens=8, batch_size=250
)
BATCH = 250  # questions at a time


@dataclass(kw_only=True)
class CompareSettings:
    """How much is trained and asked.

    Attributes:
        seed: of the base, the problems and the training.
        questions: problems with their answers to train on.
        held_out: problems that STaR measures its rounds on.
        problems: unseen ones, which every row of the table answers.
        steps: of training direct answers, pause tokens and Quiet-STaR.
        rounds: of STaR at most.
    """

    _argument_group_name = "comparison"

    seed: int = setting(0, "Of the base, the problems and the training.")
    questions: int = setting(2000, "Problems with their answers to train on.")
    held_out: int = setting(300, "Problems that STaR measures its rounds on.")
    problems: int = setting(500, "Unseen problems, which every row of the table answers.")
    steps: int = setting(300, "Steps of training direct answers, pause tokens and Quiet-STaR.")
    rounds: int = setting(10, "Rounds of STaR at most.")

    def __post_init__(self) -> None:
        for name in sorted(setting_names(CompareSettings)):
            value, least = getattr(self, name), 0 if name == "seed" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}")


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` brings back.

    Attributes:
        report: the rows over the unseen problems.
        rounds: the runs of STaR, by the names of their rows.
        seconds: that all of it took.
        folder: holds the models, ``report.json`` and ``compare.png``.
    """

    report: TaskReport
    rounds: dict[str, StarResult]
    seconds: int
    folder: Path

    def table(self) -> str:
        """Every row, with how often it is right and what it took."""
        header = ["answers to unseen problems", "accuracy [95 %]", "probability", "steps", "seconds"]
        rows = []
        for each in self.report.rows:
            count = len(each.answers)
            sure = [answer.probability for answer in each.answers if answer.probability is not None]
            rows.append(
                [
                    each.name,
                    percent(self.report.means[each.name][ACCURACY]),
                    f"{sum(sure) / count:.1%}" if sure else "",
                    str(each.settings["steps"] or ""),
                    str(each.settings["seconds"] or ""),
                ]
            )
        return table(header, rows)


@one_thread()
def compare(output_dir: str | Path | None = None, **settings: Any) -> Comparison:
    """Train and ask direct answers, chain of thought, pause tokens, STaR and Quiet-STaR on the built-in task.

    Args:
        output_dir: folder for the models, ``report.json`` and ``compare.png``; ``runs/compare`` by default. What a
            run that was killed has left of STaR is gone on with.
        settings: any field of :class:`CompareSettings`.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value.
        FileExistsError: ``output_dir`` holds an earlier comparison.
        BlockingIOError: another run is in ``output_dir`` at this time.
    """
    check_names("compare()", settings, setting_names(CompareSettings))
    made = CompareSettings(**settings)
    folder = Path(output_dir or DEFAULT)
    if (folder / REPORT_FILE).exists():
        raise FileExistsError(
            f"output_dir is {str(folder)!r}, but it holds an earlier comparison: choose another folder"
        )
    with alone_in(folder):
        return _Comparing(folder, made).result()


class _Comparing:
    """One base, what is made of it, and the problems that all of it answers."""

    def __init__(self, folder: Path, settings: CompareSettings):
        self.folder, self.settings, self.began = folder, settings, time.monotonic()
        print("1/5  a small decoder learns to write some workings")
        self.base, self.tokenizer = pretrained_model(CACHE, settings.seed, BASE, documents_with_hints)
        self.trained, self.held_out, self.asked = (
            read_questions(SUMS, split=split, max_questions=count, seed=settings.seed)
            for split, count in zip(SPLITS, (settings.questions, settings.held_out, settings.problems), strict=True)
        )
        self.rows: list[Row] = []

    def result(self) -> Comparison:
        self._direct("base, direct", self._wrapped(), seconds=0)
        self._reasoned("base, chain of thought", self.base, steps=0, seconds=0)
        print("2/5  it learns to answer directly, without and with pause tokens")
        self._direct("trained on answers, direct", *self._learn("direct", PlainTrainer))
        paused, seconds = self._learn("pause", QuietStarTrainer, pauses=True, rationales=1)
        self._direct("trained with pause tokens", paused, seconds, OWN)
        rounds = {}
        for number, (name, rationalise) in enumerate((("STaR without hints", False), ("STaR with hints", True)), 3):
            print(f"{number}/5  {name}: it learns from its own workings")
            rounds[name] = self._bootstrap(name, rationalise)
        print("5/5  Quiet-STaR: it learns to think")
        thinking, seconds = self._learn("quiet-star", QuietStarTrainer)
        self._direct("Quiet-STaR, without thoughts", thinking, seconds)
        self._direct("Quiet-STaR, with its thoughts", thinking, seconds, OWN)

        report = TaskReport("sums", self.asked, tuple(self.rows))
        found = Comparison(report, rounds, round(time.monotonic() - self.began), self.folder)
        write_report(
            self.folder / REPORT_FILE,
            [report],
            command="qstar compare",
            seed=self.settings.seed,
            settings=asdict(self.settings),
            seconds=found.seconds,
            rounds={
                name: {"before": each.before, "held_out": each.held_out, "rounds": [asdict(one) for one in each.rounds]}
                for name, each in rounds.items()
            },
        )
        if can_draw():
            draw_comparison(report, rounds, self.folder / PLOT_FILE)
        return found

    def _wrapped(self, **thoughts: Any) -> QuietStarModel:
        """A copy of the base that can think."""
        base = copy.deepcopy(self.base)
        return wrap(base, self.tokenizer, start_init=WORKING, end_init=EQUALS, **(SIZES | thoughts))

    def _learn(self, name: str, trainer: type[QuietStarTrainer], **thoughts: Any) -> tuple[QuietStarModel, int]:
        """A copy of the base that was trained on problems with their answers, and the seconds it took."""
        began = time.monotonic()
        args = QuietStarArguments(
            output_dir=str(self.folder / name),
            **TRAINING | dict(max_steps=self.settings.steps, seed=self.settings.seed, report_to="none"),
        )
        set_seed(args.seed)
        texts = [SUMS.prompt(each) + SUMS.continuation(each) for each in self.trained.questions]
        random.Random(args.seed).shuffle(texts)  # else problems that begin alike would be packed together
        rows = pack(Dataset.from_dict({args.text_column: texts}), self.tokenizer, args.seq_length, args.text_column)
        model = self._wrapped(**thoughts)
        trainer(model, args, train_dataset=rows, processing_class=self.tokenizer).train()
        model.save_pretrained(args.folder)
        self.tokenizer.save_pretrained(args.folder)
        return model, round(time.monotonic() - began)

    def _bootstrap(self, name: str, rationalise: bool) -> StarResult:
        began = time.monotonic()
        folder = self.folder / ("star-hints" if rationalise else "star")
        found = star(
            self.base,
            self.trained,
            tokenizer=self.tokenizer,
            held_out=self.held_out,
            output_dir=folder,
            resume=(folder / BEGUN_FILE).is_file(),
            wording=WORDING,
            is_right=SUMS.is_right,
            rationalise=rationalise,
            rounds=self.settings.rounds,
            seed=self.settings.seed,
            **STAR,
        )
        print(f"\n{found.table()}\n")
        steps = sum(each.steps for each in found.rounds)
        self._reasoned(name, found.model, steps, round(time.monotonic() - began))
        return found

    def _direct(self, name: str, model: QuietStarModel, seconds: int, thoughts: Thoughts = None) -> None:
        """A row of answers that stand right behind the question."""
        asked = answer_directly(model, self.tokenizer, SUMS, self.asked.questions, thoughts=thoughts, batch_size=BATCH)
        self._add(name, dict(asked), self.settings.steps if seconds else 0, seconds)

    def _reasoned(self, name: str, model: PreTrainedModel, steps: int, seconds: int) -> None:
        """A row of answers behind workings that the model writes."""
        settings = ReasoningSettings(max_new_tokens=STAR["max_new_tokens"], batch_size=BATCH)
        self._add(name, dict(reason(model, self.tokenizer, SUMS, self.asked.questions, settings)), steps, seconds)

    def _add(self, name: str, answers: dict[int, Answered], steps: int, seconds: int) -> None:
        in_order = tuple(answers[place] for place in range(len(self.asked.questions)))
        self.rows.append(Row(name, in_order, dict(steps=steps, seconds=seconds)))
