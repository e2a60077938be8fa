"""Chain of thought: text is generated, and an answer read out of it; on demand the majority of several.

With exemplars the text comes to its answer by itself (Wei et al., 2022, arXiv 2201.11903). Without, the model is asked
to think step by step and then, behind what it said, for the answer (Kojima et al., 2022, arXiv 2205.11916). The
majority of several answers is that of Wang et al. (2022, arXiv 2203.11171).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.evaluation.answers import Reading
from qstar.evaluation.questions import Question
from qstar.evaluation.report import Answered
from qstar.evaluation.sampling import SeededSearch, seed_of_repeat
from qstar.evaluation.tasks import Task
from qstar.generation.model import GeneratingModel
from qstar.generation.settings import GenerationSettings
from qstar.prompting.continuations import Continuations
from qstar.prompting.prompts import Prompt, check_length, prompt_tokens
from qstar.prompting.settings import SearchSettings
from qstar.thinking import evaluating


@dataclass(frozen=True, kw_only=True)
class ReasoningSettings:
    """How answers are reasoned for. The defaults are those of the paper, but for its majority of eight.

    Attributes:
        exemplars: worked questions that are shown first; none for the two prompts of Kojima et al.
        repeats: answers to each question, of which the majority counts.
        temperature: text is sampled at; 0 takes the most probable token.
        max_new_tokens: at most so many tokens of reasoning.
        answer_tokens: at most so many tokens of an answer that is asked for behind the reasoning.
        thinking: thoughts before each token of all that; their seed differs by repeat.
        batch_size: sequences at a time.
        seed: of sampled text.
    """

    exemplars: tuple[Question, ...] = ()
    repeats: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 384
    answer_tokens: int = 32
    thinking: GenerationSettings = field(default_factory=GenerationSettings)
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("repeats", "max_new_tokens", "answer_tokens", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least 1")
        if not isfinite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature!r}, but it must be a number of at least 0")


def reason(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    settings: ReasoningSettings,
) -> Iterator[tuple[int, Answered]]:
    """Answer questions by reasoning, in batches of about one length, the longest first.

    What is said to a question does not depend on the others, but for rounding.

    Args:
        model: any causal language model of transformers, with or without thoughts.
        tokenizer: its own.
        task: of the questions.
        questions: all are checked before the first is answered.
        settings: of the reasoning.

    Yields:
        Places in ``questions``, each once, with the answers. ``detail`` holds for each repeat what was generated
        (``texts``, and ``answers`` where they were asked for), which answer was read (``said``), how (``read_by``) and
        whether it is right (``right``), and how often each was said (``votes``). Of several that were said as often,
        the one that came first counts.

    Raises:
        ValueError: repeats would all be alike; a setting of thoughts for a model that has none; a question cannot be
            written in the tokenizer's words, or is too long.
    """
    check_repeats(model, settings)
    reasoner = _Reasoner(model, tokenizer, task, settings)
    prompts = [task.reasoning_prompt(each, settings.exemplars) for each in questions]
    lengths = [len(row) for row in prompt_tokens(tokenizer, map(Prompt, prompts))]
    for question, length in zip(questions, lengths, strict=True):
        try:
            check_length(model, settings.thinking, length, reasoner.most_tokens)
        except ValueError as error:
            raise ValueError(f"question {question.number} is too long: {error}") from None
    order = sorted(range(len(questions)), key=lambda place: -lengths[place])
    batches = [order[begin : begin + settings.batch_size] for begin in range(0, len(order), settings.batch_size)]

    def answers() -> Iterator[tuple[int, Answered]]:
        for places in batches:
            here = [questions[place] for place in places]
            with evaluating(model):
                answered = reasoner.answer(here, [prompts[place] for place in places])
            yield from zip(places, answered, strict=True)

    return answers()


def accuracy_of_repeats(answers: Sequence[Answered]) -> list[float]:
    """The share of right answers in each repeat by itself, of answers that :func:`reason` gave."""
    return [sum(repeat) / len(answers) for repeat in zip(*(each.detail["right"] for each in answers), strict=True)]


def check_repeats(model: PreTrainedModel, settings: ReasoningSettings) -> None:
    """Refuse repeats of which nothing would tell one from another.

    Raises:
        ValueError: neither text nor thoughts are sampled.
    """
    thinking = settings.thinking
    thinks = isinstance(model, GeneratingModel) and (
        model.has_learned_to_think if thinking.think is None else thinking.think
    )
    differ = settings.temperature or (thinks and not thinking.when.never and thinking.thought_temperature)
    if settings.repeats > 1 and not differ:
        raise ValueError(
            f"repeats is {settings.repeats}, but all of them would be alike, since neither text nor thoughts are "
            "sampled: give temperature, or thought_temperature for a model that thinks"
        )


class _Reasoner:
    """Generates what a task asks for, all repeats of a batch of questions at once."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, settings: ReasoningSettings
    ):
        self.model, self.tokenizer, self.task, self.settings = model, tokenizer, task, settings
        self.answer_prompt = "" if settings.exemplars else task.answer_prompt
        self.most_tokens = settings.max_new_tokens
        if self.answer_prompt:
            self.most_tokens += len(tokenizer(self.answer_prompt)["input_ids"]) + settings.answer_tokens
        self._continuations(0, SearchSettings())  # which refuses settings of thoughts for a model that has none

    def answer(self, questions: Sequence[Question], prompts: Sequence[str]) -> list[Answered]:
        """One for each question."""
        texts: list[list[str]] = [[] for _ in questions]
        answers: list[list[str]] = [[] for _ in questions]
        for repeat in range(self.settings.repeats):
            said = self._said(prompts, repeat, self.settings.max_new_tokens, self.settings.temperature)
            for row, text in zip(texts, said, strict=True):
                row.append(text)
            if self.answer_prompt:
                asked = [each + text.rstrip() + self.answer_prompt for each, text in zip(prompts, said, strict=True)]
                for row, text in zip(answers, self._said(asked, repeat, self.settings.answer_tokens), strict=True):
                    row.append(text)
        return [self._answered(*each) for each in zip(questions, texts, answers, strict=True)]

    def _answered(self, question: Question, texts: list[str], answers: list[str]) -> Answered:
        readings: list[Reading]
        if answers:
            readings = [self.task.read_first(text, question) for text in answers]
        else:
            readings = [self.task.read(text, question) for text in texts]
        said = [reading.said for reading in readings]
        votes = Counter(each for each in said if each is not None)
        winner = max(votes, key=votes.__getitem__) if votes else None
        detail = {
            "texts": texts,
            **({"answers": answers} if answers else {}),
            "said": said,
            "read_by": [reading.by for reading in readings],
            "right": [self.task.is_right(each, question) for each in said],
            "votes": dict(votes),
        }
        return Answered(self.task.is_right(winner, question), said=winner, detail=detail)

    def _said(self, prompts: Sequence[str], repeat: int, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """What is said to each prompt, up to where another question begins."""
        seed = seed_of_repeat(self.settings.seed, repeat)
        search = SeededSearch(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            stop=self.task.stop,
            text_temperature=temperature,
            text_seed=seed,
        )
        said = self._continuations(repeat, search).of([Prompt(text) for text in prompts], self.settings.batch_size)
        return [_before(each.text, self.task.stop) for each in said]

    def _continuations(self, repeat: int, search: SearchSettings) -> Continuations:
        thinking = self.settings.thinking
        if repeat and thinking.thought_temperature:
            thinking = replace(thinking, thought_seed=seed_of_repeat(thinking.thought_seed, repeat))
        return Continuations(self.model, self.tokenizer, thinking, search)


def _before(text: str, stops: Sequence[str]) -> str:
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
