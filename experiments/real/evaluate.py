"""How probable a model finds held-out text and the answers to questions, with its thoughts and with others."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from common.folders import made_with, write_json
from qstar.evaluation import controls
from qstar.evaluation.direct import answer_directly
from qstar.evaluation.record import write_report
from qstar.evaluation.report import Row, TaskReport
from qstar.evaluation.run import OWN_THOUGHTS, WITHOUT, evaluate_tasks
from qstar.evaluation.store import model_identity
from qstar.evaluation.tasks import Task
from qstar.evaluation.text_scores import score_text
from qstar.model import QuietStarModel
from qstar.whole_file import write_whole
from real.settings import Variant
from real.sources import Sources

TEXT_FILE = "text.safetensors"
TEXT_RECORD = "text.json"
COMMAND = "python experiments/real_model.py"


@contextmanager
def precision(sources: Sources) -> Iterator[None]:
    """Compute in float32, or in bfloat16 by autocast, as the settings say."""
    with torch.autocast(sources.device.type, torch.bfloat16, enabled=sources.settings.eval_bf16):
        yield


def evaluate_text(folder: Path, model: QuietStarModel, variant: Variant | None, sources: Sources) -> None:
    """Score every token of the held-out text, into ``text.safetensors`` and, last, ``text.json``.

    Args:
        folder: of the variant and seed.
        model: that is evaluated.
        variant: it is of; None for the base.
        sources: of the text.
    """
    began = time.monotonic()
    batches: Any = sources.held_out_batches
    options: dict[str, Any] = dict(max_grid_tokens=sources.settings.max_grid_tokens or None)
    with precision(sources):
        if variant is None or not variant.thinks:
            found = score_text(model, batches, thoughts=None)
            values: dict[str, Tensor] = {"row": found.row, WITHOUT: found.without}
        else:
            own = score_text(model, batches, **options)
            assert own.after is not None
            values = {"row": own.row, WITHOUT: own.without, OWN_THOUGHTS: own.after}
            for name, read in {} if variant.pauses else _in_place_of(own.thoughts, model, variant, sources).items():
                after = score_text(model, batches, thoughts=read, **options).after
                assert after is not None
                values[name] = after
    write_whole(folder / TEXT_FILE, save(values))
    record = {"tokens": len(values["row"]), "rows": int(values["row"][-1]) + 1}
    write_json(folder / TEXT_RECORD, record | {"seconds": round(time.monotonic() - began, 1)} | made_with())


def read_text_scores(folder: Path) -> dict[str, Tensor] | None:
    """The row of every token, and its log-probability in each way; None where they are not there whole."""
    return load_file(folder / TEXT_FILE) if (folder / TEXT_RECORD).exists() else None


def _in_place_of(
    thoughts: list[Tensor], model: QuietStarModel, variant: Variant, sources: Sources
) -> dict[str, list[Tensor]]:
    """What a model reads in the place of its own thoughts, by the names of the controls."""
    tokenizer, seed = sources.tokenizer, 0
    shapes = [(len(each), each.shape[1]) for each in thoughts]
    limit = sources.settings.max_grid_tokens or None
    before = score_text(sources.untrained(variant), sources.held_out_batches, max_grid_tokens=limit)
    return {
        controls.PAUSE: controls.pauses(shapes, controls.pause_token(model, tokenizer)),
        controls.ELSEWHERE: controls.elsewhere(thoughts, seed),
        controls.RANDOM: controls.random_tokens(model, tokenizer, shapes, seed),
        controls.UNTRAINED: before.thoughts,
    }


def task_file(folder: Path, task: Task) -> Path:
    """Where the answers to a task's questions lie, once all are there."""
    return folder / f"{task.name}.json"


def evaluate_task(
    folder: Path, model: QuietStarModel, variant: Variant | None, task: Task, sources: Sources, saved: Path | None
) -> None:
    """Score the answers to a task's questions right behind them, into its file; the rest as :func:`evaluate_text`.

    ``saved`` is the folder of the model, by whose files its answers are told from those of others.
    """
    began = time.monotonic()
    size = sources.settings.question_batch_size
    questions = sources.questions(task)
    with precision(sources):
        if variant is None or not variant.thinks:
            options: dict[str, Any] = dict(thoughts=None, batch_size=size)
            answers = dict(answer_directly(model, sources.tokenizer, task, questions.questions, **options))
            in_order = tuple(answers[place] for place in range(len(questions.questions)))
            report = TaskReport(task.name, questions, (Row(WITHOUT, in_order, {"thoughts": None}),))
        else:
            [report] = evaluate_tasks(
                model,
                sources.tokenizer,
                [task],
                sources=sources.files,
                untrained=None if variant.pauses else lambda: sources.untrained(variant),
                folder=folder / "answers",
                identity=None if saved is None else model_identity(saved),
                controls=not variant.pauses,
                max_questions=sources.settings.max_questions,
                batch_size=size,
            )
    seconds = round(time.monotonic() - began, 1)
    write_report(
        task_file(folder, task), [report], command=COMMAND, seed=0, seconds=seconds, device=made_with()["device"]
    )
