"""The rounds of STaR in a folder whose files are whole or not there, so that a run that was killed can go on."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

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
from qstar.ancestors.wording import Wording
from qstar.evaluation.questions import Question
from qstar.evaluation.report import percent, share_right
from qstar.evaluation.tables import finite_or_none
from qstar.whole_file import write_whole

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
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


class Rounds:
    """A run of STaR in a folder, which holds a folder for each round; what one holds already is not done again."""

    def __init__(
        self,
        original: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: tuple[Question, ...],
        held_out: tuple[Question, ...],
        exemplars: tuple[Question, ...],
        wording: Wording,
        is_right: Callable[[str, Question], bool],
        settings: StarSettings,
        folder: Path,
    ):
        self.original, self.tokenizer = original, tokenizer
        self.questions, self.held_out, self.exemplars = questions, held_out, exemplars
        self.wording, self.is_right, self.settings, self.folder = wording, is_right, settings, folder
        self._latest: tuple[int, PreTrainedModel] = 0, original

    def run(self) -> tuple[int | None, list[Round]]:
        """Go on until nothing is gained: the held-out questions that the original model answers right, and the rounds.

        The models of the best round and of the last one stay.
        """
        before, rounds = self._measure(0), list[Round]()
        while self._goes_on(before, rounds):
            done = self._round(len(rounds) + 1)
            if done is None:
                logger.warning("round %d solves no question any more: STaR ends with the ones before", len(rounds) + 1)
                break
            rounds.append(done)
            for number in range(1, len(rounds)):
                if number != self.best(rounds):
                    self.drop_model(number)
            self._say(done)
        if before is not None and max(each.right or 0 for each in rounds) <= before:
            logger.warning("no round answers more of the held-out questions than the original model does")
        return before, rounds

    def _goes_on(self, before: int | None, rounds: list[Round]) -> bool:
        if before is None or not rounds:
            return len(rounds) < self.settings.rounds
        best = max(range(len(rounds) + 1), key=[before, *(each.right or 0 for each in rounds)].__getitem__)
        return len(rounds) < self.settings.rounds and len(rounds) - best < self.settings.patience

    def _round(self, number: int) -> Round | None:
        """Do what is left of a round; None where the model before it reaches no answer any more."""
        folder = self._round_folder(number)
        report = folder / REPORT_FILE
        if not report.is_file():
            rationales = self._rationales(number)
            if not rationales:
                return None
            rows = [training_row(self.tokenizer, each) for each in rationales]
            steps = self.settings.steps(number)
            self._latest = 0, self.original  # the model before is not needed any more, and training needs its memory
            loss = fine_tune(self.original, self.tokenizer, rows, self.settings, steps, self.model_folder(number))
            hinted = sum(each.rationalised for each in rationales)
            right = self._measure(number)
            write_json(report, asdict(Round(number, len(rationales) - hinted, hinted, steps, loss, right)))
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
        if not found and number == 1:
            raise ValueError(_nothing_reached(said, self.questions, self.settings))
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
            self.is_right,
            path,
            numbers=numbers,
            max_new_tokens=self.settings.max_new_tokens,
            batch_size=self.settings.batch_size,
            what=what,
        )

    def _model(self, number: int) -> PreTrainedModel:
        """The model after round ``number``, always as it was saved, so that a run that was killed has the same."""
        if self._latest[0] != number:
            self._latest = number, read_trained(self.model_folder(number)) if number else self.original
        return self._latest[1]

    def best(self, rounds: list[Round]) -> int:
        """The number of the best round on the held-out questions; of the last one where there are none."""
        if not self.held_out:
            return len(rounds)
        return max(rounds, key=lambda each: each.right or 0).number

    def drop_model(self, number: int) -> None:
        """Delete the model after a round, if it is there; what it said stays."""
        if self.model_folder(number).exists():
            shutil.rmtree(self.model_folder(number))

    def _round_folder(self, number: int) -> Path:
        return self.folder / f"round-{number:02d}"

    def model_folder(self, number: int) -> Path:
        """Where the model after a round lies."""
        return self._round_folder(number) / "model"

    def _say(self, done: Round) -> None:
        hints = f" and {done.rationalised} more with a hint" if self.settings.rationalise else ""
        after = "" if done.right is None else f"; held out {percent(share_right(done.right, len(self.held_out)))}"
        print(f"round {done.number}: {done.solved} of {len(self.questions)} solved{hints}, {done.steps} steps{after}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all; numbers that are not finite are null."""
    write_whole(path, json.dumps(finite_or_none(content), indent=2) + "\n")


def _nothing_reached(said: Sequence[Attempt], questions: Sequence[Question], settings: StarSettings) -> str:
    """What to say where no rationale of the first round reaches its answer."""
    hinted = ", with hints neither" if settings.rationalise else ""
    samples = "; ".join(
        f"to {question.text!r} it said {each.said!r}, where {question.answer!r} is right"
        for each, question in zip(said[:SHOWN_FAILURES], questions, strict=False)
    )
    return (
        f"no question of {len(said)} was solved in the first round{hinted}, so that there is nothing to learn from: "
        f"{samples}. Give exemplars, easier questions, a larger max_new_tokens than {settings.max_new_tokens}, or an "
        "answer_pattern that reads what the model says"
    )
