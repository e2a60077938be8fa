"""How a model answers the problems of a task, with thoughts and with what stands in their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from qstar.evaluation.controls import elsewhere, pause_token, pauses, random_tokens
from qstar.evaluation.scoring import OWN, Request, Thoughts, score_requests
from qstar.model import QuietStarModel
from tasks.task import Problem, Task

OWN_THOUGHTS, SAMPLED, NO_THOUGHTS = "its thoughts", "its thoughts, sampled", "no thoughts"
UNTRAINED, UNTRAINED_SAMPLED = "untrained thoughts", "untrained thoughts, sampled"
FIRST = "its first {} tokens"
ELSEWHERE, RANDOM, SAME = "another problem's thoughts", "random tokens", "one token, repeated"
BATCH = 100  # problems that are answered at a time


@dataclass(frozen=True)
class Answers:
    """What a model made of some problems.

    Attributes:
        right: whether the most probable of the permitted answers is right, of each problem.
        log_prob: of the right answer among the permitted ones, nats.
        thoughts: that were read, ``[1, K]`` of each problem; None where the model did not think.
    """

    right: list[bool]
    log_prob: list[float]
    thoughts: list[Tensor] | None


@dataclass(frozen=True)
class Exam:
    """Problems, and how they are asked."""

    task: Task
    tokenizer: PreTrainedTokenizerFast
    problems: list[Problem]
    seed: int

    def answers(self, model: QuietStarModel, thoughts: Thoughts, temperature: float = 0.0) -> Answers:
        """What ``model`` answers with ``thoughts``, as :func:`qstar.evaluation.scoring.score_requests` takes them."""
        vocabulary = self.tokenizer.get_vocab()
        requests = [
            Request([vocabulary[word] for word in each.prompt.split()], [vocabulary[each.answer]])
            for each in self.problems
        ]
        permitted = [vocabulary[word] for word in self.task.choices]
        options: dict[str, Any] = dict(temperature=temperature, seed=self.seed, batch_size=BATCH)
        found = dict(score_requests(model, requests, thoughts=thoughts, permitted=permitted, **options))
        scores = [found[number] for number in range(len(requests))]
        read = [each.thoughts for each in scores if each.thoughts is not None]
        return Answers(
            right=[bool(each.permitted_best) for each in scores],
            log_prob=[round(each.permitted_log_prob.item(), 4) for each in scores],
            thoughts=read or None,
        )

    def with_thoughts(self, model: QuietStarModel, untrained: QuietStarModel) -> dict[str, Answers]:
        """What ``model`` answers with its own thoughts, and with all that could stand in their place.

        ``untrained`` is the same model before its training, whose thoughts the trained one reads.
        """
        own = self.answers(model, OWN)
        before, before_sampled = (self.answers(untrained, OWN, temperature) for temperature in (0.0, 1.0))
        assert own.thoughts and before.thoughts and before_sampled.thoughts
        shapes = [(1, each.shape[1]) for each in own.thoughts]
        read = {
            UNTRAINED: before.thoughts,
            UNTRAINED_SAMPLED: before_sampled.thoughts,
            ELSEWHERE: elsewhere(own.thoughts, self.seed),
            RANDOM: random_tokens(model, self.tokenizer, shapes, self.seed),
            SAME: pauses(shapes, pause_token(model, self.tokenizer)),
        }
        for tokens in self.task.cuts:
            read[FIRST.format(tokens)] = [each[:, :tokens] for each in own.thoughts]
        rows = {OWN_THOUGHTS: own, SAMPLED: self.answers(model, OWN, 1.0), NO_THOUGHTS: self.answers(model, None)}
        return rows | {name: self.answers(model, thoughts) for name, thoughts in read.items()}

    def written(self, answers: Answers) -> list[bool] | None:
        """Whether each thought is the working of its problem, as far as it goes; None without thoughts."""
        if answers.thoughts is None:
            return None
        vocabulary = self.tokenizer.get_vocab()
        found = []
        for thought, problem in zip(answers.thoughts, self.problems, strict=True):
            working = [vocabulary[word] for word in problem.working]
            said = thought[0].tolist()
            both = min(len(said), len(working))
            found.append(said[:both] == working[:both])
        return found
