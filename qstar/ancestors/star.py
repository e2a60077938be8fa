"""STaR: rationales that a model writes itself, of which those are learned that reach the right answer.

    M_0 = the model
    for n = 1, 2, ...:
        ask M_{n-1} every question, greedily; where it fails, ask again with the answer as a hint
        D = the rationales that reach the answer, behind questions without hints
        M_n = M_0, trained on D

Zelikman et al., 2022, arXiv 2203.14465, algorithm 1.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.adapters import has_adapters
from qstar.ancestors.fine_tuning import fine_tune, read_trained
from qstar.ancestors.rationales import (
    Attempt,
    Rationale,
    attempt,
    kept,
    read_rationales,
    training_row,
    write_rationales,
)
from qstar.ancestors.settings import StarSettings
from qstar.ancestors.shares import shown
from qstar.ancestors.wording import Wording
from qstar.config import check_names, setting_names
from qstar.evaluation.questions import Question, Questions
from qstar.evaluation.tables import finite_or_none, table
from qstar.training.folders import alone_in
from qstar.training.prepare import check_model_name, read_model

logger = logging.getLogger(__name__)

DEFAULT = Path("runs/star")
BEGUN_FILE, REPORT_FILE = "star.json", "report.json"  # what the run began with, and what came of it
SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Round:
    """What a round did.

    Attributes:
        number: of the round, from 1.
        solved: questions to train on that the model before this round answered right, without a hint.
        rationalised: further ones that it answered right with the answer as a hint.
        steps: of training.
        loss: mean over them, nats per token of rationales and answers.
        right: held-out questions that the trained model answers right; None where there are none.
    """

    number: int
    solved: int
    rationalised: int
    steps: int
    loss: float
    right: int | None


@dataclass(frozen=True)
class StarResult:
    """What :func:`star` brings back.

    Attributes:
        model: of the best round on the held-out questions; of the last one where there are none.
        tokenizer: its tokenizer.
        rounds: all of them.
        best: number of the model's round.
        before: held-out questions that the original model answered right; None where there are none.
        questions: to train on, how many.
        held_out: how many.
        folder: holds the model, ``report.json``, and every round's rationales and attempts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rounds: tuple[Round, ...]
    best: int
    before: int | None
    questions: int
    held_out: int
    folder: Path

    def table(self) -> str:
        """The rounds as a text table, shares with their 95 % intervals."""
        header = ["round", "solved before it", "with a hint", "trained on", "steps", "loss", "held out"]
        first = ["0", "", "", "", "", "", "" if self.before is None else shown(self.before, self.held_out)]
        rows = [
            [
                f"{each.number}{' (best)' if each.number == self.best else ''}",
                f"{each.solved} of {self.questions}",
                str(each.rationalised),
                str(each.solved + each.rationalised),
                str(each.steps),
                f"{each.loss:.4f}",
                "" if each.right is None else shown(each.right, self.held_out),
            ]
            for each in self.rounds
        ]
        return table(header, [first, *rows])


def star(
    model: str | Path | PreTrainedModel,
    questions: Questions | Sequence[Question],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    held_out: Questions | Sequence[Question] = (),
    exemplars: Sequence[Question] = (),
    output_dir: str | Path | None = None,
    resume: bool = False,
    wording: Wording | None = None,
    **settings: Any,
) -> StarResult:
    """Bootstrap a model's reasoning from the rationales of its own that reach the right answer.

    Args:
        model: a hub name, a folder or a model object, which is not changed. One that has learned to think thinks before
            every token that it says, and in the training; any other is a plain model.
        questions: to train on, each with its answer; no rationale of theirs is used.
        tokenizer: of a model object; found by the model's name by default.
        held_out: questions to measure every round on. STaR stops when it gains nothing on them.
        exemplars: questions with rationales that stand before each question; none by default.
        output_dir: folder for the result; ``runs/star`` by default.
        resume: go on with the run in ``output_dir``, whenever it was killed: what comes is the same, bit for bit.
        wording: how questions are put and answers read; the defaults of :class:`Wording` where None.
        settings: any field of :class:`qstar.ancestors.settings.StarSettings`.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value; no questions, or some of them also held out; an exemplar without a
            rationale; adapters; a run that began otherwise is to be resumed; no rationale of the first round reaches
            an answer.
        FileNotFoundError: ``model`` is neither here nor a name that the hub could have; nothing to resume.
        FileExistsError: ``output_dir`` holds an earlier run.
        BlockingIOError: another run is in ``output_dir`` at this time.
    """
    check_names("star()", settings, setting_names(StarSettings))
    made, wording = StarSettings(**settings), wording or Wording()
    asked, withheld = _listed(questions), _listed(held_out)
    _check(asked, withheld, exemplars)
    folder = Path(output_dir or DEFAULT)
    check_model_name(model)
    named = model.name_or_path if isinstance(model, PreTrainedModel) else model
    begun = {
        "model": str(named),
        "settings": asdict(made),
        "wording": asdict(wording),
        **{
            name: {"count": len(each), "fingerprint": _fingerprint(each)}
            for name, each in (("questions", asked), ("held_out", withheld), ("exemplars", exemplars))
        },
    }
    with alone_in(folder):
        _begin(folder, json.loads(json.dumps(begun)), resume)
        original, tokenizer = read_model(model, tokenizer)
        if has_adapters(original):
            raise ValueError("model has adapters, but each round trains a whole model: merge them first")
        run = _Bootstrapping(original, tokenizer, asked, withheld, tuple(exemplars), wording, made, folder)
        return run.result(begun)


class _Bootstrapping:
    """A run of STaR in a folder, which holds a folder for each round; what one holds already is not done again."""

    def __init__(
        self,
        original: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: tuple[Question, ...],
        held_out: tuple[Question, ...],
        exemplars: tuple[Question, ...],
        wording: Wording,
        settings: StarSettings,
        folder: Path,
    ):
        self.original, self.tokenizer = original, tokenizer
        self.questions, self.held_out, self.exemplars = questions, held_out, exemplars
        self.wording, self.settings, self.folder = wording, settings, folder
        self._latest: tuple[int, PreTrainedModel] = 0, original

    def result(self, begun: dict[str, Any]) -> StarResult:
        """Go on until nothing is gained, and leave the best round's model in the folder."""
        began = time.monotonic()
        report = self.folder / REPORT_FILE
        if not report.is_file():
            before, rounds = self._measure(0), list[Round]()
            while self._goes_on(before, rounds):
                rounds.append(self._round(len(rounds) + 1))
                self._drop_models({self._best(rounds), len(rounds)})
                self._say(rounds[-1])
            best = self._best(rounds)
            shutil.copytree(self._model_folder(best), self.folder, dirs_exist_ok=True)
            seconds = round(time.monotonic() - began)
            found = begun | dict(before=before, best=best, seconds=seconds, rounds=[asdict(each) for each in rounds])
            _write(report, found)
            if before is not None and (rounds[best - 1].right or 0) <= before:
                logger.warning("no round answers more of the held-out questions than the original model does")
        self._drop_models(set())
        found = json.loads(report.read_text())
        return StarResult(
            model=read_trained(self.folder),
            tokenizer=self.tokenizer,
            rounds=tuple(Round(**each) for each in found["rounds"]),
            best=found["best"],
            before=found["before"],
            questions=len(self.questions),
            held_out=len(self.held_out),
            folder=self.folder,
        )

    def _goes_on(self, before: int | None, rounds: list[Round]) -> bool:
        if before is None or not rounds:
            return len(rounds) < self.settings.rounds
        best = max(range(len(rounds) + 1), key=[before, *(each.right or 0 for each in rounds)].__getitem__)
        return len(rounds) < self.settings.rounds and len(rounds) - best < self.settings.patience

    def _round(self, number: int) -> Round:
        folder = self._round_folder(number)
        report = folder / REPORT_FILE
        if not report.is_file():
            rationales = self._rationales(number)
            rows = [training_row(self.tokenizer, each) for each in rationales]
            steps = self.settings.steps(number)
            self._latest = 0, self.original  # the model before is not needed any more, and training needs its memory
            loss = fine_tune(self.original, self.tokenizer, rows, self.settings, steps, self._model_folder(number))
            hinted = sum(each.rationalised for each in rationales)
            right = self._measure(number)
            _write(report, asdict(Round(number, len(rationales) - hinted, hinted, steps, loss, right)))
        return Round(**json.loads(report.read_text()))

    def _rationales(self, number: int) -> list[Rationale]:
        """D of a round, by the model before it."""
        folder = self._round_folder(number)
        path = folder / "rationales.jsonl"
        if path.is_file():
            return read_rationales(path)
        everything = range(len(self.questions))
        said = self._attempts(number - 1, everything, folder / "attempts.jsonl", f"round {number}")
        found = kept(said, self.questions, self.wording, rationalised=False)
        failed = [each.question for each in said if not each.right]
        hinted: list[Attempt] = []
        if self.settings.rationalise and failed:
            hinted = self._attempts(number - 1, failed, folder / "hinted.jsonl", f"round {number}, hints", hinted=True)
            found += kept(hinted, self.questions, self.wording, rationalised=True)
        if not found:
            raise ValueError(_nothing_reached(number, said, self.questions, self.settings))
        write_rationales(path, found)
        return found

    def _measure(self, number: int) -> int | None:
        """How many held-out questions the model after round ``number`` answers right."""
        if not self.held_out:
            return None
        numbers, path = range(len(self.held_out)), self._round_folder(number) / "held_out.jsonl"
        said = self._attempts(number, numbers, path, f"after round {number}", withheld=True)
        return sum(each.right for each in said)

    def _attempts(
        self,
        after: int,
        numbers: Sequence[int],
        path: Path,
        what: str,
        *,
        hinted: bool = False,
        withheld: bool = False,
    ) -> list[Attempt]:
        """What the model after round ``after`` says to some of the questions, or of those that are held out."""
        asked = [(self.held_out if withheld else self.questions)[number] for number in numbers]
        path.parent.mkdir(exist_ok=True)
        return attempt(
            self._model(after),
            self.tokenizer,
            [self.wording.ask(each, self.exemplars, hinted=hinted) for each in asked],
            asked,
            self.wording,
            path,
            numbers=numbers,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            what=what,
        )

    def _model(self, number: int) -> PreTrainedModel:
        """The model after round ``number``, always as it was saved, so that a run that was killed has the same."""
        if self._latest[0] != number:
            self._latest = number, read_trained(self._model_folder(number)) if number else self.original
        return self._latest[1]

    def _best(self, rounds: list[Round]) -> int:
        if not self.held_out:
            return len(rounds)
        return max(rounds, key=lambda each: each.right or 0).number

    def _drop_models(self, but: set[int]) -> None:
        for folder in self.folder.glob("round-*/model"):
            if folder not in {self._model_folder(number) for number in but}:
                shutil.rmtree(folder)

    def _round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"

    def _model_folder(self, number: int) -> Path:
        return self._round_folder(number) / "model"

    def _say(self, done: Round) -> None:
        hints = f" and {done.rationalised} more with a hint" if self.settings.rationalise else ""
        after = "" if done.right is None else f"; held out {shown(done.right, len(self.held_out))}"
        print(f"round {done.number}: {done.solved} of {len(self.questions)} solved{hints}, {done.steps} steps{after}")


def _listed(questions: Questions | Sequence[Question]) -> tuple[Question, ...]:
    return questions.questions if isinstance(questions, Questions) else tuple(questions)


def _check(asked: Sequence[Question], withheld: Sequence[Question], exemplars: Sequence[Question]) -> None:
    if not asked:
        raise ValueError("questions is empty, but STaR needs some to train on")
    trained = {each.text for each in asked}
    for name, others in (("held_out", withheld), ("exemplars", exemplars)):
        both = next((each.text for each in others if each.text in trained), None)
        if both is not None:
            raise ValueError(f"{name} holds {both!r}, which is one of the questions to train on: leave it out of one")
    for each in exemplars:
        if not each.rationale:
            raise ValueError(f"exemplars holds {each.text!r} without a rationale, but it must show one")


def _begin(folder: Path, begun: dict[str, Any], resume: bool) -> None:
    """Write down what the run begins with, or hold a run that is resumed to it."""
    path = folder / BEGUN_FILE
    if not path.is_file():
        if resume:
            raise FileNotFoundError(f"resume is True, but {folder} holds no {BEGUN_FILE}: there is no run to go on with")
        _write(path, begun)
        return
    if not resume:
        raise FileExistsError(
            f"output_dir is {str(folder)!r}, but it holds an earlier run: go on with it by resume=True, or choose "
            "another folder"
        )
    before = json.loads(path.read_text())
    changed = [name for name in begun if before.get(name) != begun[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{name} is {begun[name]}, but the run in {folder} began with {before.get(name)}: it can only go on as it "
            "began"
        )


def _write(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(finite_or_none(content), indent=2) + "\n")
    os.replace(beside, path)


def _fingerprint(questions: Sequence[Question]) -> str:
    content = json.dumps([asdict(each) for each in questions])
    return hashlib.sha256(content.encode()).hexdigest()


def _nothing_reached(
    number: int, said: Sequence[Attempt], questions: Sequence[Question], settings: StarSettings
) -> str:
    """What to say where no rationale of a round reaches its answer."""
    hinted = ", with hints neither" if settings.rationalise else ""
    samples = "; ".join(
        f"to {questions[each.question].text!r} it said {each.said!r}, where {questions[each.question].answer!r} is right"
        for each in said[:SHOWN_FAILURES]
    )
    return (
        f"no question of {len(said)} was solved in round {number}{hinted}, so that there is nothing to learn from: "
        f"{samples}. Give exemplars, easier questions, a larger max_new_tokens than {settings.max_new_tokens}, or an "
        "answer_pattern that reads what the model says"
    )
