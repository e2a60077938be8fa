"""Quiet-STaR beside its ancestors on the built-in task: one base, the same problems and answers, one table.

The base can write some workings, but not all. All that is trained sees the same problems with their answers, and no
working: what needs one must write it itself.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast, set_seed

from qstar.ancestors.rationales import attempt
from qstar.ancestors.shares import shown
from qstar.ancestors.star import BEGUN_FILE, StarResult, star
from qstar.ancestors.wording import Wording, is_right
from qstar.config import check_names, setting, setting_names
from qstar.cpu import one_thread
from qstar.data import pack
from qstar.embedded.comparison_plot import PLOT_FILE, draw_comparison
from qstar.embedded.pretrain import PretrainSettings, pretrained_model
from qstar.embedded.run import CACHE, SETTINGS, SIZES, PlainTrainer
from qstar.embedded.task import EQUALS, WORKING, documents_with_hints, problems
from qstar.evaluation.choices import choice_log_probs
from qstar.evaluation.questions import Question, Questions
from qstar.evaluation.report import Answered, Row, TaskReport
from qstar.evaluation.tables import table
from qstar.model import QuietStarModel
from qstar.training.curves import can_draw
from qstar.training.folders import alone_in
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import wrap

DEFAULT = Path("runs/compare")
REPORT_FILE = "report.json"
BASE = PretrainSettings(check_steps=5, goal=0.3)  # stops where it writes about a third of the workings
WORDING = Wording(
    prompt=f"{{question}} {EQUALS} {WORKING}",
    hinted_prompt=f"{WORKING} {{answer}} {{question}} {EQUALS} {WORKING}",
    exemplar=" {rationale} = {answer} ",
    answer_pattern=rf"{EQUALS} (\d)",
    stop=(),
)
TRAINING: dict[str, Any] = SETTINGS | dict(policy_weight=100.0, sample_steps=0, logging_steps=50, curves=False)
STAR: dict[str, Any] = dict(
    patience=5, learning_rate=1e-3, warmup_steps=10, train_batch_size=32, max_new_tokens=8, batch_size=250
)


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
        header = ["answers to unseen problems", "accuracy (95 % interval)", "probability", "steps", "seconds"]
        rows = []
        for each in self.report.rows:
            count = len(each.answers)
            sure = [answer.probability for answer in each.answers if answer.probability is not None]
            rows.append(
                [
                    each.name,
                    shown(sum(answer.right for answer in each.answers), count),
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
        draws = {"train": settings.questions, "validation": settings.held_out, "test": settings.problems}
        asked = {split: _questions(count, settings.seed, self.tokenizer, split) for split, count in draws.items()}
        self.trained, self.held_out, self.asked = asked.values()
        self.rows: list[Row] = []

    def result(self) -> Comparison:
        self._direct("base, direct", self._wrapped(), seconds=0)
        self._reasoned("base, chain of thought", self.base, steps=0, seconds=0)
        print("2/5  it learns to answer directly, without and with pause tokens")
        self._direct("trained on answers, direct", *self._learn("direct", PlainTrainer))
        paused, seconds = self._learn("pause", QuietStarTrainer, pauses=True, rationales=1)
        self._direct("trained with pause tokens", paused, seconds, thinking=True)
        rounds = {}
        for number, (name, rationalise) in enumerate((("STaR without hints", False), ("STaR with hints", True)), 3):
            print(f"{number}/5  {name}: it learns from its own workings")
            rounds[name] = self._bootstrap(name, rationalise)
        print("5/5  Quiet-STaR: it learns to think")
        thinking, seconds = self._learn("quiet-star", QuietStarTrainer)
        self._direct("Quiet-STaR, without thoughts", thinking, seconds)
        self._direct("Quiet-STaR, with its thoughts", thinking, seconds, thinking=True)

        report = TaskReport("sums", self.asked, tuple(self.rows))
        found = Comparison(report, rounds, round(time.monotonic() - self.began), self.folder)
        (self.folder / REPORT_FILE).write_text(json.dumps(self._record(found), indent=2) + "\n")
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
        texts = [f"{each.text} {EQUALS} {each.answer}" for each in self.trained.questions]
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
            rationalise=rationalise,
            rounds=self.settings.rounds,
            seed=self.settings.seed,
            **STAR,
        )
        print(f"\n{found.table()}\n")
        steps = sum(each.steps for each in found.rounds)
        self._reasoned(name, found.model, steps, round(time.monotonic() - began))
        return found

    def _direct(self, name: str, model: QuietStarModel, seconds: int, *, thinking: bool = False) -> None:
        """A row of answers that stand right behind the question, scored over the digits."""
        prompts = [self.tokenizer(f"{each.text} {EQUALS}")["input_ids"] for each in self.asked.questions]
        asked = problems(1, 0, self.tokenizer)
        digits = torch.tensor(asked.choices)
        log_probs = choice_log_probs(model, torch.tensor(prompts), digits, thinking=thinking)
        answers = []
        for row, question in zip(log_probs, self.asked.questions, strict=True):
            said, right = str(int(row.argmax())), int(question.answer)
            answers.append(Answered(said == question.answer, probability=float(row[right].exp()), said=said))
        steps = self.settings.steps if seconds else 0
        self.rows.append(Row(name, tuple(answers), dict(steps=steps, seconds=seconds, thinking=thinking)))

    def _reasoned(self, name: str, model: PreTrainedModel, steps: int, seconds: int) -> None:
        """A row of answers behind workings that the model writes."""
        questions = self.asked.questions
        said = attempt(
            model,
            self.tokenizer,
            [WORDING.ask(each) for each in questions],
            questions,
            WORDING,
            is_right,
            self.folder / f"{name.replace(' ', '-').replace(',', '')}.jsonl",
            numbers=range(len(questions)),
            max_new_tokens=STAR["max_new_tokens"],
            batch_size=STAR["batch_size"],
        )
        answers = tuple(Answered(each.right, said=each.answer, detail={"text": each.said}) for each in said)
        self.rows.append(Row(name, answers, dict(steps=steps, seconds=seconds)))

    def _record(self, found: Comparison) -> dict[str, Any]:
        """All of it as JSON can say it."""
        return {
            "task": found.report.task,
            "settings": asdict(self.settings),
            "seconds": found.seconds,
            "fingerprint": self.asked.fingerprint,
            "rows": [
                {
                    "name": each.name,
                    "right": sum(answer.right for answer in each.answers),
                    "of": len(each.answers),
                    **each.settings,
                    "answers": [
                        {"question": question.text, "answer": question.answer, **asdict(answer)}
                        for question, answer in zip(self.asked.questions, each.answers, strict=True)
                    ],
                }
                for each in found.report.rows
            ],
            "rounds": {
                name: {"before": each.before, "held_out": each.held_out, "rounds": [asdict(one) for one in each.rounds]}
                for name, each in found.rounds.items()
            },
        }


def _questions(count: int, seed: int, tokenizer: PreTrainedTokenizerFast, split: str) -> Questions:
    """``count`` different problems of a split."""
    found: dict[str, Question] = {}
    drawn = problems(4 * count, seed, tokenizer, split)
    for prompt, working, answer in zip(drawn.prompts, drawn.workings, drawn.answers, strict=True):
        text, reasons, right = (str(tokenizer.decode(tokens)) for tokens in (prompt[:-1], working, answer))
        if len(found) < count and text not in found:
            found[text] = Question(text, right, rationale=reasons, number=len(found))
    if len(found) < count:
        raise ValueError(
            f"{count} different problems are wanted, but the split {split!r} has no more than {len(found)}"
        )
    return Questions(tuple(found.values()), f"sums, {split}", _fingerprint(found))


def _fingerprint(texts: Any) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
