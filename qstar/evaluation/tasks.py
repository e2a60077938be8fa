"""Tasks: where questions come from, how they are written, and what an answer may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qstar.data import AnyDataset
from qstar.evaluation.answers import MARK, Answers, Letters, Numbers, Reading, Words
from qstar.evaluation.columns import FILES, Columns, given_columns, listed_choices, placed_rows, question_of
from qstar.evaluation.permitted import permitted_tokens
from qstar.evaluation.questions import Question

STEP_BY_STEP = "Let's think step by step."  # Kojima et al. (2022)


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: of the task.
        answers: the kind of its answers.
        source: hub name or path of its data set; None where it has none of its own.
        config: the configuration of it.
        split: that is evaluated on.
        columns: of it.
        compares_choices: whether the texts of the choices are compared by their log-likelihood, where their letters
            would be said.
        stop: texts that end generated reasoning, since another question begins there.
    """

    name: str
    answers: Answers
    source: str | None = None
    config: str | None = None
    split: str = "test"
    columns: Columns = field(default_factory=Columns)
    compares_choices: bool = False
    stop: tuple[str, ...] = ("Q:",)

    def every_question(
        self, source: str | Path | AnyDataset | None, split: str | None
    ) -> tuple[str, Sequence[Question]]:
        """The name of a source, by default the task's own, and all questions in it.

        Raises:
            FileNotFoundError: there is no such source.
            ValueError: it cannot be read, or a row holds no question of this task; the task has no source.
        """
        if source is None and self.source is None:
            raise ValueError(f"task {self.name!r} has no data set of its own: give a source")
        own = source is None or source == self.source
        source = self.source if source is None else source
        assert source is not None
        rows = placed_rows(source, self.config if own else None, split, self.split)
        questions = [
            question_of(row, self.columns, self.answers, place, number) for number, (place, row) in enumerate(rows)
        ]
        return str(source) if isinstance(source, (str, Path)) else "dataset", questions

    def prompt(self, question: Question) -> str:
        """What stands before a direct answer: the paper's, or lm-evaluation-harness' where choices are compared."""
        if self.compares_choices:
            return f"Question: {question.text}\nAnswer:"
        return f"{self.asked(question)}\nA:"

    def continuation(self, question: Question) -> str:
        """The right answer as it stands right behind :meth:`prompt`."""
        if self.compares_choices:
            return self.choice_texts(question)[question.right_choice]
        return f" {question.answer}\n"

    def permitted(self, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
        """Tokens that the paper's metric permits in an answer: digits, or letters of choices, and the newline.

        A token counts by its text, with or without a space before it. None where any token may be in an answer.
        """
        permits = self.answers.permits
        return None if permits is None or self.compares_choices else permitted_tokens(tokenizer, permits)

    def choice_texts(self, question: Question) -> tuple[str, ...]:
        """What is compared by its log-likelihood behind :meth:`prompt`; nothing where one answer is scored."""
        return tuple(f" {choice}" for choice in question.choices) if self.compares_choices else ()

    def asked(self, question: Question) -> str:
        """The question with its choices, each in a line of its own, without space at the end."""
        choices = zip(question.labels, question.choices, strict=True)
        return "\n".join([f"Q: {question.text}", *(f"({label}) {choice}" for label, choice in choices)])

    def reasoning_prompt(self, question: Question, exemplars: Sequence[Question] = ()) -> str:
        """What stands before reasoning: worked exemplars, or without any the words of Kojima et al. (2022)."""
        if not exemplars:
            return f"{self.asked(question)}\nA: {STEP_BY_STEP}"
        shown = "".join(f"{self.asked(each)}\nA:{self.worked(each)}\n\n" for each in exemplars)
        return f"{shown}{self.asked(question)}\nA:"

    def worked(self, question: Question) -> str:
        """A question's rationale and answer, as they stand behind ``A:``.

        Raises:
            ValueError: it has no rationale.
        """
        if question.rationale is None:
            raise ValueError(f"question {question.text!r} has no rationale, but it must have one to be shown")
        answer = f"({question.answer})" if question.choices else question.answer
        return f" {question.rationale} The answer is {answer}."

    @property
    def answer_prompt(self) -> str:
        """What stands behind reasoning without exemplars, so that the answer follows; empty where nothing needs to."""
        return f"\n{self.answers.asked}"

    def read(self, text: str, question: Question | None = None) -> Reading:
        """The answer that reasoning comes to, and how it was found; choices may be named that a question has."""
        return self.answers.read(text, question.choices if question else ())

    def read_first(self, text: str, question: Question | None = None) -> Reading:
        """The answer that a text begins with, which follows :attr:`answer_prompt`."""
        return self.answers.first(text, question.choices if question else ())

    def read_answer(self, text: str) -> str | None:
        """The answer that reasoning comes to, as answers are compared; None where none can be read."""
        return self.read(text).said

    def is_right(self, said: str | None, question: Question) -> bool:
        """Whether what was said is the right answer, however it is written."""
        return said is not None and self.answers.normalised(said) == self.answers.normalised(question.answer)


_GSM8K = Columns(mark=MARK)
_ARC = Columns(answer="answerKey", choices="choices")
TASKS = (
    Task("gsm8k", Numbers(), "openai/gsm8k", "main", columns=_GSM8K),
    Task("commonsense_qa", Letters(), "tau/commonsense_qa", split="validation", columns=_ARC),
    Task("arc_easy", Letters(), "allenai/ai2_arc", "ARC-Easy", columns=_ARC, compares_choices=True),
    Task("arc_challenge", Letters(), "allenai/ai2_arc", "ARC-Challenge", columns=_ARC, compares_choices=True),
    Task("svamp", Numbers(), "ChilleD/SVAMP", columns=Columns(("Body", "Question"), "Answer")),
)


def find_task(name_or_path: str | Path, **columns: Any) -> Task:
    """The built-in task of that name, or the task in a file.

    Args:
        name_or_path: ``gsm8k``, ``commonsense_qa``, ``arc_easy``, ``arc_challenge`` or ``svamp``; or a ``.jsonl``,
            ``.json`` or ``.parquet`` file, see :func:`task_of_file`.
        columns: that differ from the task's: ``question_column``, ``answer_column``, ``choices_column``,
            ``labels_column``, ``rationale_column``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument that does not exist.
        ValueError: there is no such task, or the file cannot be read.
    """
    for task in TASKS:
        if task.name == name_or_path:
            return replace(task, columns=replace(task.columns, **given_columns(**columns)))
    if isinstance(name_or_path, Path) or Path(name_or_path).suffix in FILES or Path(name_or_path).is_file():
        return task_of_file(name_or_path, **columns)
    names = ", ".join(repr(task.name) for task in TASKS)
    raise ValueError(f"task is {name_or_path!r}, but it must be {names}, or a file that ends in {', '.join(FILES)}")


def task_of_file(path: str | Path, **columns: Any) -> Task:
    """The task whose questions are in a file.

    Without arguments the columns are ``question`` and ``answer`` (or ``answerKey``), and ``choices`` and ``rationale``
    where the first row has them. With choices, answers are their letters, as many as the question with most of them
    has; without, they are numbers where all of them are, else text. Where every answer has ``####``, it stands behind.

    Args:
        path: of a ``.jsonl``, ``.json`` or ``.parquet`` file.
        columns: see :func:`find_task`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: an argument that does not exist.
        ValueError: it cannot be read, or the first row lacks a column.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"task is {str(path)!r}, but there is no such file")
    rows = list(placed_rows(path, None, None, "test"))
    place, first = rows[0]
    usual = Columns(
        answer="answerKey" if "answer" not in first and "answerKey" in first else "answer",
        choices="choices" if "choices" in first else None,
        rationale="rationale" if "rationale" in first else None,
    )
    chosen = replace(usual, **given_columns(**columns))
    for column in chosen.names():
        if column not in first:
            raise ValueError(f"{place} has no column {column!r}, but {', '.join(map(repr, first)) or 'nothing'}")
    values = [row.get(chosen.answer) for _, row in rows]
    if all(isinstance(value, str) and MARK in value for value in values):
        chosen = replace(chosen, mark=MARK)
        values = [value.rpartition(MARK)[2] for value in values if isinstance(value, str)]
    answers: Answers
    if chosen.choices is not None:
        listed = [listed_choices(row.get(chosen.choices), chosen.choices, place)[0] for place, row in rows]
        answers = Letters(max(2, *map(len, listed)))
    elif all(Numbers().written(value) is not None for value in values):
        answers = Numbers()
    else:
        answers = Words()
    return Task(Path(path).stem, answers, str(path), columns=chosen)
