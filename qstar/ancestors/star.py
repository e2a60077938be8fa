"""STaR: rationales that a model writes itself, of which those are learned that reach the right answer.

    M_0 = the model
    for n = 1, 2, ...:
        ask M_{n-1} every question, greedily; where it fails, ask again with the answer as a hint
        D = the rationales that reach the answer, behind questions without hints
        M_n = M_0, trained on D

Zelikman et al., 2022, arXiv 2203.14465, algorithm 1.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.adapters import has_adapters
from qstar.ancestors.fine_tuning import read_trained
from qstar.ancestors.rounds import REPORT_FILE, Round, Rounds, write_json
from qstar.ancestors.settings import StarSettings
from qstar.ancestors.wording import Wording
from qstar.config import check_names, setting_names
from qstar.evaluation.answers import Letters, Numbers, Words
from qstar.evaluation.questions import Question, Questions, fingerprint
from qstar.evaluation.report import percent, share_right
from qstar.evaluation.tables import table
from qstar.training.folders import alone_in
from qstar.training.prepare import check_model_name, read_model

DEFAULT = Path("runs/star")
BEGUN_FILE = "star.json"  # what the run began with


def is_right(answer: str, question: Question) -> bool:
    """Whether an answer is the question's: the same letter of a choice, the same number, or else the same words."""
    kinds = (Letters(),) if question.choices else (Numbers(), Words())
    kind = next(each for each in kinds if each.normalised(question.answer) is not None)
    return kind.normalised(answer) == kind.normalised(question.answer)


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
        first = [
            "0",
            "",
            "",
            "",
            "",
            "",
            "" if self.before is None else percent(share_right(self.before, self.held_out)),
        ]
        rows = [
            [
                f"{each.number}{' (best)' if each.number == self.best else ''}",
                f"{each.solved} of {self.questions}",
                str(each.rationalised),
                str(each.solved + each.rationalised),
                str(each.steps),
                f"{each.loss:.4f}",
                "" if each.right is None else percent(share_right(each.right, self.held_out)),
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
    is_right: Callable[[str, Question], bool] = is_right,
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
        is_right: whether an answer that was read is the question's; a task's own, or by default :func:`is_right`.
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
            name: {"count": len(each), "fingerprint": fingerprint(each)}
            for name, each in (("questions", asked), ("held_out", withheld), ("exemplars", exemplars))
        },
    }
    with alone_in(folder):
        original, tokenizer = read_model(model, tokenizer)
        if has_adapters(original):
            raise ValueError("model has adapters, but each round trains a whole model: merge them first")
        _begin(folder, json.loads(json.dumps(begun)), resume)
        rounds = Rounds(original, tokenizer, asked, withheld, tuple(exemplars), wording, is_right, made, folder)
        return _result(rounds, begun)


def _result(rounds: Rounds, begun: dict[str, Any]) -> StarResult:
    """Leave the best round's model and the report in the folder of the run, where an earlier life has not."""
    report = rounds.folder / REPORT_FILE
    if not report.is_file():
        before, done = rounds.run()
        best = rounds.best(done)
        shutil.copytree(rounds.model_folder(best), rounds.folder, dirs_exist_ok=True)
        write_json(report, begun | dict(before=before, best=best, rounds=[asdict(each) for each in done]))
    found = json.loads(report.read_text())
    for each in found["rounds"]:
        rounds.drop_model(each["number"])
    return StarResult(
        model=read_trained(rounds.folder),
        tokenizer=rounds.tokenizer,
        rounds=tuple(Round(**each) for each in found["rounds"]),
        best=found["best"],
        before=found["before"],
        questions=len(rounds.questions),
        held_out=len(rounds.held_out),
        folder=rounds.folder,
    )


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
            raise FileNotFoundError(
                f"resume is True, but {folder} holds no {BEGUN_FILE}: there is no run to go on with"
            )
        write_json(path, begun)
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
