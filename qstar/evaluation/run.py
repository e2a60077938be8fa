"""Tasks asked in several ways over the same questions: what a model gained, beside what else could explain it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import isfinite
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.config import check_names, setting, setting_names
from qstar.evaluation import controls
from qstar.evaluation.direct import answer_directly, thoughts_of
from qstar.evaluation.exemplars import read_exemplars
from qstar.evaluation.questions import Question, Questions, fingerprint, read_questions
from qstar.evaluation.reasoning import ReasoningSettings, check_repeats, reason
from qstar.evaluation.report import Answered, Row, TaskReport
from qstar.evaluation.scoring import OWN, Thoughts
from qstar.evaluation.store import AnswerStore, store_path
from qstar.evaluation.tasks import Task, find_task
from qstar.generation.settings import GenerationSettings
from qstar.model import QuietStarModel

WITHOUT, OWN_THOUGHTS = "without thoughts", "with its thoughts"
BEFORE = "before training, without thoughts"

Answers = Iterable[tuple[int, Answered]]


@dataclass(kw_only=True)
class TaskSettings:
    """How tasks are asked.

    Attributes:
        max_questions: draw so many questions of each task; all by default.
        seed: of the draw, of sampled thoughts and texts, and of controls.
        controls: beside the model's own thoughts, let it read others of the same length in their place.
        thought_temperature: thoughts are sampled at; greedy by default.
        chain_of_thought: also let the model reason in words, with so many worked exemplars before the question; 0 asks
            it to think step by step.
        exemplars: a file with exemplars in the place of ours, as JSON lines with question, rationale and answer.
        repeats: chains of thought for each question, of which the majority counts.
        temperature: text is sampled at in them; greedy by default.
        max_new_tokens: at most so many tokens in a chain of thought.
        batch_size: rows at a time.
    """

    _argument_group_name = "tasks"

    max_questions: int | None = setting(None, "Draw so many questions of each task.")
    seed: int = setting(0, "Of the draw, of sampled thoughts and texts, and of the controls.")
    controls: bool = setting(True, "Let the model read other thoughts of the same length in the place of its own, too.")
    thought_temperature: float = setting(0.0, "Thoughts are sampled at it; 0 is greedy.")
    chain_of_thought: int | None = setting(
        None, "Reason in words as well, with so many worked exemplars; 0: 'Let's think step by step'."
    )
    exemplars: Path | None = setting(None, "JSON lines with question, rationale and answer, in the place of ours.")
    repeats: int = setting(1, "Chains of thought for each question, of which the majority counts.")
    temperature: float = setting(0.0, "Chains of thought are sampled at it; 0 is greedy.")
    max_new_tokens: int = setting(384, "At most so many tokens in a chain of thought.")
    batch_size: int = setting(8, "Rows at a time.")

    def __post_init__(self) -> None:
        for name, least in (("max_questions", 1), ("chain_of_thought", 0), ("repeats", 1), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}, but it must be in 0..2^32 - 1")
        for name in ("thought_temperature", "temperature"):
            value = getattr(self, name)
            if not isfinite(value) or value < 0:
                raise ValueError(f"{name} is {value!r}, but it must be a number of at least 0")
        given = [name for name in ("exemplars", "repeats", "temperature", "max_new_tokens") if self._is_set(name)]
        if given and self.chain_of_thought is None:
            raise ValueError(f"{given[0]} is given, but chain_of_thought is not: it would have no effect")
        if self.exemplars is not None and not self.chain_of_thought:
            raise ValueError("exemplars are given, but chain_of_thought is 0: none of them would be shown")

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path | Task],
    *,
    sources: Mapping[str, Any] | None = None,
    untrained: Callable[[], PreTrainedModel] | None = None,
    folder: str | Path | None = None,
    identity: Any = None,
    **settings: Any,
) -> tuple[TaskReport, ...]:
    """Ask a model the questions of tasks, with and without thoughts, and with controls in their place.

    Args:
        model: any causal language model of transformers; one that never learned to think has one row.
        tokenizer: its own.
        tasks: names, files or objects, see :func:`qstar.evaluation.tasks.find_task`.
        sources: of the questions, by the task's name: a file, a folder, a hub name or an object of ``datasets``, where
            it is not the task's own.
        untrained: gives the model as it was before training, with the same vocabulary.
        folder: where answers are kept while they are made: what is there is not asked again.
        identity: what tells the model from others, see :func:`qstar.evaluation.store.model_identity`.
        settings: any field of :class:`TaskSettings`.

    Returns:
        A report for each task, in which every row has answered the same questions.

    Raises:
        FileNotFoundError: a task's file or source is not there.
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value, or one that would have no effect; a task that does not exist;
            questions that cannot be read or are too long; ``folder`` holds answers that were made otherwise.
    """
    check_names("evaluate_tasks()", settings, setting_names(TaskSettings))
    chosen = TaskSettings(**settings)
    sources = dict(sources or {})
    found = [task if isinstance(task, Task) else find_task(task) for task in tasks]
    for name in sources:
        if name not in {task.name for task in found}:
            raise ValueError(f"sources name {name!r}, but the tasks are {', '.join(task.name for task in found)}")
    asked = [
        read_questions(task, sources.get(task.name), max_questions=chosen.max_questions, seed=chosen.seed)
        for task in found
    ]
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch if folder is None else folder)
        return tuple(
            _Asking(model, tokenizer, task, questions, chosen, place, identity).report(untrained)
            for task, questions in zip(found, asked, strict=True)
        )


class _Asking:
    """The questions of one task, put to a model in one way after the other."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        questions: Questions,
        settings: TaskSettings,
        folder: Path,
        identity: Any,
    ):
        self.model, self.tokenizer, self.task, self.questions = model, tokenizer, task, questions
        self.settings, self.folder, self.identity = settings, folder, identity
        self.sampling: dict[str, Any] = dict(temperature=settings.thought_temperature, seed=settings.seed)
        self.rows: list[Row] = []

    def report(self, untrained: Callable[[], PreTrainedModel] | None) -> TaskReport:
        reasoning = self.ways_to_reason()  # whose settings are checked before anything is asked
        self.ask(WITHOUT, {"thoughts": None}, self.directly(self.model, None))
        if isinstance(self.model, QuietStarModel):
            own = self.ask(OWN_THOUGHTS, {"thoughts": OWN} | self.sampling, self.directly(self.model, OWN))
            if self.settings.controls:
                self.controls(self.model, own, untrained)
        for name, settings in reasoning.items():
            said = asdict(settings) | {"exemplars": fingerprint(settings.exemplars)}
            del said["batch_size"]
            self.ask(name, said, partial(self.by_reasoning, settings))
        return TaskReport(self.task.name, self.questions, tuple(self.rows))

    def controls(self, model: QuietStarModel, own: Row, untrained: Callable[[], PreTrainedModel] | None) -> None:
        """What the model answers when it reads something else."""
        thoughts, seed = thoughts_of(own.answers), self.settings.seed
        shapes = [(len(each), each.shape[1]) for each in thoughts]
        pause = controls.pause_token(model, self.tokenizer)
        read = {controls.PAUSE: controls.pauses(shapes, pause)}
        if sum(length for length, _ in shapes) > 1:
            read[controls.ELSEWHERE] = controls.elsewhere(thoughts, seed)
        read[controls.RANDOM] = controls.random_tokens(model, self.tokenizer, shapes, seed)
        for name, given in read.items():
            made = {"token": self.tokenizer.decode(pause)} if name == controls.PAUSE else {"seed": seed}
            self.ask(name, {"thoughts": name} | made, self.directly(model, given))
        if untrained is None:
            return
        before = untrained()
        self.ask(BEFORE, {"thoughts": None}, self.directly(before, None))

        def read_what_it_thought(places: Sequence[int]) -> Answers:
            thought = dict(self.directly(before, OWN)(places))
            given = thoughts_of([thought[number] for number in range(len(places))])
            return answer_directly(
                model, self.tokenizer, self.task, self.at(places), thoughts=given, batch_size=self.settings.batch_size
            )

        self.ask(controls.UNTRAINED, {"thoughts": controls.UNTRAINED} | self.sampling, read_what_it_thought)

    def ways_to_reason(self) -> dict[str, ReasoningSettings]:
        """Chains of thought by the names of their rows: without thoughts and, if the model can think, with them."""
        mine = self.settings
        if mine.chain_of_thought is None:
            return {}
        shown = () if not mine.chain_of_thought else read_exemplars(self.task, mine.exemplars)[: mine.chain_of_thought]
        if len(shown) < mine.chain_of_thought:
            raise ValueError(f"chain_of_thought is {mine.chain_of_thought}, but there are {len(shown)} exemplars")
        self.task.reasoning_prompt(self.questions.questions[0], shown)  # which refuses exemplars that it cannot show
        thinking = [GenerationSettings(think=False)]
        if isinstance(self.model, QuietStarModel):
            sampling: dict[str, Any] = dict(thought_temperature=mine.thought_temperature, thought_seed=mine.seed)
            thinking.append(GenerationSettings(think=True, **sampling))
        ways = {}
        for each in thinking:
            differ = mine.temperature or each.thought_temperature or each is thinking[-1]
            settings = ReasoningSettings(
                exemplars=shown,
                repeats=mine.repeats if differ else 1,  # greedy text alone would be the same each time
                temperature=mine.temperature,
                max_new_tokens=mine.max_new_tokens,
                thinking=each,
                batch_size=mine.batch_size,
                seed=mine.seed,
            )
            check_repeats(self.model, settings)
            exemplars = f"{len(shown)} exemplars" if shown else ""
            majority = f"majority of {settings.repeats}" if settings.repeats > 1 else ""
            parts = ("chain of thought", exemplars, majority, OWN_THOUGHTS if each.think else "")
            ways[", ".join(filter(None, parts))] = settings
        return ways

    def by_reasoning(self, settings: ReasoningSettings, places: Sequence[int]) -> Answers:
        """Answers to the questions at some places, read out of generated text."""
        return reason(self.model, self.tokenizer, self.task, self.at(places), settings)

    def directly(self, model: PreTrainedModel, thoughts: Thoughts) -> Callable[[Sequence[int]], Answers]:
        """Direct answers to the questions at some places; given ``thoughts`` are for all requests of all questions."""

        def answer(places: Sequence[int]) -> Answers:
            given = thoughts
            if thoughts is not None and thoughts != OWN:
                given = [each for place in places for each in thoughts[self.begins[place] : self.begins[place + 1]]]
            options = self.sampling if thoughts == OWN else {}
            return answer_directly(
                model,
                self.tokenizer,
                self.task,
                self.at(places),
                thoughts=given,
                batch_size=self.settings.batch_size,
                **options,
            )

        return answer

    def at(self, places: Sequence[int]) -> list[Question]:
        return [self.questions.questions[place] for place in places]

    @cached_property
    def begins(self) -> list[int]:
        """How many requests stand before those of each question."""
        counts = (len(self.task.choice_texts(each)) or 1 for each in self.questions.questions)
        return list(accumulate(counts, initial=0))

    def ask(self, name: str, settings: dict[str, Any], answer: Callable[[Sequence[int]], Answers]) -> Row:
        """Add a row: what is on disk of it, and ``answer`` to the rest."""
        settings = json.loads(json.dumps(settings, default=str))
        header = {
            "model": self.identity,
            "task": self.task.name,
            "questions": self.questions.fingerprint,
            "row": name,
            "settings": settings,
        }
        count = len(self.questions.questions)
        with AnswerStore(store_path(self.folder, self.task.name, name), header) as store:
            missing = [place for place in range(count) if place not in store]
            done = count - len(missing)
            if missing:
                label = f"{self.task.name}: {name}"
                answers = tqdm(answer(missing), label, count, initial=done, leave=False, disable=None, unit="question")
                for number, answered in answers:
                    store.add(missing[number], answered)
            row = Row(name, tuple(store[place] for place in range(count)), settings)
        self.rows.append(row)
        return row
