"""Running sums modulo ten as a task to be evaluated, without a file: see :mod:`qstar.embedded.task`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from qstar.data import AnyDataset
from qstar.embedded.task import DIGITS, EQUALS, MODULUS, QUESTION, SPLITS, WORKING, running_sums, split_of
from qstar.evaluation.answers import NOTHING, Numbers, Reading
from qstar.evaluation.questions import Question
from qstar.evaluation.tasks import Task


@dataclass(frozen=True)
class Sums(Task):
    """All problems of a split, in the words of the corpus; a question is its digits with spaces between them."""

    def every_question(
        self, source: str | Path | AnyDataset | None, split: str | None
    ) -> tuple[str, Sequence[Question]]:
        """The problems in the order of their digits.

        Raises:
            ValueError: a source is given, or there is no such split.
        """
        if source is not None:
            raise ValueError(f"source is {source!r}, but task {self.name!r} has no data set: its questions are made")
        split = self.split if split is None else split
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, but it must be one of {', '.join(map(repr, SPLITS))}")
        problems = (digits for digits in product(range(MODULUS), repeat=DIGITS) if split_of(digits) == split)
        return f"{self.name}, {split}", [_question(digits, number) for number, digits in enumerate(problems)]

    def asked(self, question: Question) -> str:
        """The problem without its ``=``."""
        return f"{QUESTION} {question.text}"

    def prompt(self, question: Question) -> str:
        """The problem up to and with its first ``=``."""
        return f"{self.asked(question)} {EQUALS}"

    def continuation(self, question: Question) -> str:
        """The answer; the corpus has no newlines."""
        return f" {question.answer}"

    def reasoning_prompt(self, question: Question, exemplars: Sequence[Question] = ()) -> str:
        """The problem up to the marker of a working.

        Raises:
            ValueError: exemplars are given: a document of the corpus holds one problem.
        """
        if exemplars:
            raise ValueError(f"{len(exemplars)} exemplars are given, but task {self.name!r} shows its working without")
        return f"{self.prompt(question)} {WORKING}"

    def worked(self, question: Question) -> str:
        """The working with its marker and the answer, as they stand behind the first ``=``."""
        return f" {WORKING} {question.rationale} {EQUALS} {question.answer}"

    @property
    def answer_prompt(self) -> str:
        """Nothing: a working comes to its answer."""
        return ""

    def read(self, text: str, question: Question | None = None) -> Reading:
        """What follows the first ``=``."""
        found = re.search(rf"{EQUALS}\s*(\d+)", text)
        return Reading(found[1], "strict") if found else NOTHING


SUMS = Sums("sums", Numbers(), stop=())


def _question(digits: tuple[int, ...], number: int) -> Question:
    sums = running_sums(digits)
    rationale = " ".join(map(str, sums))
    return Question(" ".join(map(str, digits)), str(sums[-1]), rationale=rationale, number=number)
