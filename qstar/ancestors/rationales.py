"""What a model says to questions, which of its rationales reach the answer, and the rows that are trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.ancestors.wording import Wording
from qstar.evaluation.questions import Question
from qstar.generation.settings import GenerationSettings
from qstar.grid import IGNORED
from qstar.prompting.continuations import Continuations
from qstar.prompting.prompts import Prompt
from qstar.prompting.settings import SearchSettings
from qstar.thinking import evaluating
from qstar.whole_file import write_whole


@dataclass(frozen=True)
class Attempt:
    """What was said to a question.

    Attributes:
        question: its number among those that were asked.
        said: the continuation of its prompt.
        answer: that was read in it; None where there is none.
        right: whether that is the question's.
    """

    question: int
    said: str
    answer: str | None
    right: bool


@dataclass(frozen=True)
class Rationale:
    """A text to train on: no part of it comes from a hint or an exemplar.

    Attributes:
        question: its number among those that were asked.
        prompt: the question as it is asked without hint and exemplars.
        completion: what the model said, up to and with the right answer.
        rationalised: whether it was said with the answer as a hint.
    """

    question: int
    prompt: str
    completion: str
    rationalised: bool


def attempt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    questions: Sequence[Question],
    wording: Wording,
    is_right: Callable[[str, Question], bool],
    path: Path,
    *,
    numbers: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    what: str = "reasoning",
) -> list[Attempt]:
    """Continue prompts greedily, and read the answers; every batch goes to ``path``, and one that is there stays.

    Args:
        model: a plain one, or one that thinks.
        tokenizer: its own.
        prompts: one for each question.
        questions: what was asked.
        wording: that the answers are read by.
        is_right: whether an answer is the question's.
        path: lines of JSON, an :class:`Attempt` each.
        numbers: of the questions.
        max_new_tokens: of what is said.
        batch_size: prompts at a time; the same where ``path`` holds some already.
        what: names the progress bar.

    Raises:
        ValueError: a prompt cannot be read or is too long, named by its number.
    """
    made = [Attempt(**row) for row in _whole_lines(path)]
    made = made[: len(prompts) if len(made) >= len(prompts) else len(made) // batch_size * batch_size]
    _write_lines(path, made)
    if len(made) == len(prompts):
        return made
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    search = SearchSettings(max_new_tokens=max_new_tokens, do_sample=False, stop=wording.stop)
    continuations = Continuations(model, tokenizer, GenerationSettings(), search)
    left = [Prompt(text) for text in prompts[len(made) :]]
    coming = continuations.of(left, batch_size)
    progress = tqdm(coming, desc=what, total=len(prompts), initial=len(made), unit="question", leave=False)
    with evaluating(model), path.open("a", encoding="utf-8") as file:
        for each in progress:
            number, question = numbers[len(made)], questions[len(made)]
            found = wording.read(each.text)
            answer = None if found is None else found[1]
            right = answer is not None and is_right(answer, question)
            made.append(Attempt(number, each.text, answer, right))
            file.write(_line(made[-1]))
            if len(made) % batch_size == 0:
                file.flush()
    return made


def kept(
    attempts: Iterable[Attempt], questions: Sequence[Question], wording: Wording, *, rationalised: bool
) -> list[Rationale]:
    """The rationales among attempts that reach the answer; ``questions`` are all that were asked."""
    found = []
    for each in attempts:
        if each.right:
            completion, _ = wording.read(each.said) or ("", "")
            prompt = wording.ask(questions[each.question])
            found.append(Rationale(each.question, prompt, completion, rationalised))
    return found


def training_row(tokenizer: PreTrainedTokenizerBase, rationale: Rationale) -> dict[str, list[int]]:
    """``input_ids`` and ``labels`` of question, rationale and answer: the question is read and not learned."""
    prompt = tokenizer(rationale.prompt)["input_ids"]
    whole = list(tokenizer(rationale.prompt + rationale.completion)["input_ids"])
    if tokenizer.eos_token_id is not None and whole[-1] != tokenizer.eos_token_id:
        whole.append(tokenizer.eos_token_id)
    return {"input_ids": whole, "labels": [IGNORED] * len(prompt) + whole[len(prompt) :]}


def write_rationales(path: Path, rationales: Iterable[Rationale]) -> None:
    """Write rationales as lines of JSON; the file is whole or is not there."""
    _write_lines(path, rationales)


def read_rationales(path: Path) -> list[Rationale]:
    """What :func:`write_rationales` wrote."""
    return [Rationale(**row) for row in _whole_lines(path)]


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Leave the old lines or the new ones, whenever a kill comes."""
    write_whole(path, "".join(map(_line, rows)))


def _line(row: Any) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, but for a last line that a kill has cut short; none without a file."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
