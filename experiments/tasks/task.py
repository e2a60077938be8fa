"""What the tasks of the ladder have in common: problems, splits that cannot overlap, and a corpus.

A document is a problem with its answer, or one with a note before the answer::

    Q 1 3 5 0 8 = 7                     the answer alone
    Q 1 3 5 0 8 = T 1 4 9 9 7 : 7       a working: of use, since each of its steps is easy
    Q 1 3 5 0 8 = T 1 3 5 0 8 : 7       a repetition of what the question names: of no use
    Q 1 3 5 0 8 = T 4 0 2 9 1 : 7       anything: of no use

All notes open with the same word, as in text that nobody wrote to teach reasoning. So a model of this corpus can write
a working and read it, but writes one no more often than the corpus has it. Which notes help to predict what follows is
left to the training of thoughts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qstar.embedded.pretrain import PretrainSettings
from qstar.embedded.task import SPLITS, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HELD_OUT = 16  # one problem of so many is for validation, and one for the test
NOTE_SHARE = 0.8  # of the documents
WORKING_SHARE, REPETITION_SHARE = 0.4, 0.5  # of the notes; the others are anything


@dataclass(frozen=True)
class Problem:
    """A problem in words, between which there are single spaces.

    Attributes:
        prompt: up to where the answer is predicted, or a note begins.
        named: what a repetition of the question says, as many words as the working has.
        working: the results of the steps, of which the last is the answer; there may be words between them.
        steps: how many it takes.
    """

    prompt: str
    named: tuple[str, ...]
    working: tuple[str, ...]
    steps: int

    @property
    def answer(self) -> str:
        return self.working[-1]


@dataclass(frozen=True)
class Task:
    """A kind of problem, the decoder that learns it, and how it is taught to think.

    Attributes:
        name: of the rung.
        draw: a problem by chance.
        words: the vocabulary.
        choices: the words that an answer may be.
        marker: the word that opens a note.
        close: the word that closes it, right before the answer.
        thought_tokens: K, as long as the longest working.
        cuts: numbers of tokens that a thought is cut to as well, where more steps need longer thoughts.
        pretraining: the decoder, and when its pre-training stops.
        training: settings of :class:`qstar.training.settings.QuietStarArguments` for all that is trained after it.
    """

    name: str
    draw: Callable[[random.Random], Problem]
    words: tuple[str, ...]
    choices: tuple[str, ...]
    marker: str
    close: str
    thought_tokens: int
    cuts: tuple[int, ...] = ()
    pretraining: PretrainSettings = field(default_factory=PretrainSettings)
    training: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of the task's words, one token each. Padding and end of text are one token."""
        return build_tokenizer(self.words)

    def problem(self, rng: random.Random, split: str) -> Problem:
        """A problem of ``split`` by chance.

        Raises:
            ValueError: there is no such split.
        """
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, but it must be one of {', '.join(map(repr, SPLITS))}")
        while True:
            problem = self.draw(rng)
            if split_of(problem) == split:
                return problem

    def problems(self, count: int, seed: int, split: str) -> list[Problem]:
        """``count`` different problems, the same for the same seed on every machine."""
        rng = random.Random(f"{self.name} problems {split} {seed}")
        found: dict[str, Problem] = {}
        while len(found) < count:
            problem = self.problem(rng, split)
            found.setdefault(problem.prompt, problem)
        return list(found.values())

    def documents(self, count: int, seed: int) -> list[str]:
        """``count`` documents of the training split to pre-train on, the same for the same seed on every machine."""
        rng = random.Random(f"{self.name} documents {seed}")
        return [self._document(self.problem(rng, "train"), rng) for _ in range(count)]

    def answered(self, count: int, seed: int) -> list[str]:
        """``count`` documents of the training split that show the answer alone."""
        rng = random.Random(f"{self.name} answered {seed}")
        problems = (self.problem(rng, "train") for _ in range(count))
        return [f"{problem.prompt} {problem.answer}" for problem in problems]

    def with_note(self, problem: Problem, note: tuple[str, ...]) -> str:
        """A problem up to the answer behind a note."""
        return " ".join([problem.prompt, self.marker, *note, self.close])

    def _document(self, problem: Problem, rng: random.Random) -> str:
        if rng.random() >= NOTE_SHARE:
            return f"{problem.prompt} {problem.answer}"
        kind = rng.random()
        if kind < WORKING_SHARE:
            note = problem.working
        elif kind < WORKING_SHARE + REPETITION_SHARE:
            note = problem.named
        else:
            note = tuple(rng.choice(self.choices) if word in self.choices else word for word in problem.working)
        return f"{self.with_note(problem, note)} {problem.answer}"


def split_of(problem: Problem) -> str:
    """The split of a problem: a property of its words, so that splits cannot overlap. One in 16 each is held out."""
    digest = hashlib.sha256(problem.prompt.encode()).digest()
    return {0: "test", 1: "validation"}.get(digest[0] % HELD_OUT, "train")
