"""Tasks of lm-evaluation-harness, answered with and without thoughts."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.evaluation.run import OWN_THOUGHTS, WITHOUT
from qstar.evaluation.tables import table
from qstar.model import QuietStarModel
from qstar.thinking import evaluating


def lm_eval() -> ModuleType:
    """The package lm-eval.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.tasks
        import lm_eval.utils
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tasks of the harness need the extra eval, but {error.name} is not installed: pip install lm-eval"
        ) from error
    return lm_eval


class HarnessTasks(NamedTuple):
    """Tasks of the harness, as its ``TaskManager`` found them."""

    manager: Any
    names: list[str]


def find_harness_tasks(tasks: Sequence[str], include_path: str | Path | None = None) -> HarnessTasks:
    """Find tasks among all that the harness has, which it takes seconds to read.

    Args:
        tasks: names, patterns or YAML files of the harness.
        include_path: a folder with further tasks.

    Raises:
        ValueError: lm-eval is not installed; there is no such task.
    """
    manager = lm_eval().tasks.TaskManager(include_path=None if include_path is None else str(include_path))
    return HarnessTasks(manager, found_tasks(manager, tasks))


def evaluate_with_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: HarnessTasks,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Answer tasks of lm-evaluation-harness without thoughts and, where the model can think, with them.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        tasks: what :func:`find_harness_tasks` found.
        num_fewshot: solved examples before each question; as the task says by default.
        limit: questions of each task; all by default.
        batch_size: requests at a time.
        temperature: thoughts are sampled at; greedy by default.
        seed: of sampled thoughts. The draws of the harness itself keep its own seeds, so that its examples are those
            that others have.

    Returns:
        What ``lm_eval.simple_evaluate`` returns, as JSON can say it, by the names of the rows ``WITHOUT`` and
        ``OWN_THOUGHTS``. Its ``config`` says how the model thought.
    """
    harness = lm_eval()
    from qstar.evaluation.harness_model import QuietStarLM

    rows = {WITHOUT: False} | ({OWN_THOUGHTS: True} if isinstance(model, QuietStarModel) else {})
    results = {}
    with evaluating(model):
        for name, think in rows.items():
            row = QuietStarLM(
                model,
                tokenizer=copy.deepcopy(tokenizer),  # which may be given a padding token
                batch_size=batch_size,
                think=think,
                thought_temperature=temperature,
                thought_seed=seed,
            )
            found = harness.simple_evaluate(
                row,
                tasks=tasks.names,
                task_manager=tasks.manager,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
            )
            results[name] = json.loads(json.dumps(found, default=harness.utils.handle_non_serializable))
    return results


def harness_table(results: dict[str, dict[str, Any]]) -> str:
    """Every metric of every task with its standard error, a column for each row of ``evaluate_with_harness``."""
    by_row = [each["results"] for each in results.values()]
    lines = [
        [f"{task}, {metric.removesuffix(',none')}", *(_shown(tasks[task], metric) for tasks in by_row)]
        for task, metrics in by_row[0].items()
        for metric in metrics
        if "," in metric and "_stderr," not in metric
    ]
    return table(["lm-evaluation-harness", *results], lines)


def found_tasks(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The names that names and patterns mean, and the files as they are.

    Raises:
        ValueError: the harness has no such task.
    """
    found: list[str] = []
    for task in tasks:
        names = manager.match_tasks([task])
        if not names and not Path(task).is_file():
            raise ValueError(f"tasks name {task!r}, but the harness has no such task: `lm-eval ls tasks` lists them")
        found += names or [task]
    return found


def _shown(metrics: dict[str, Any], metric: str) -> str:
    name, _, how = metric.partition(",")
    value, error = metrics[metric], metrics.get(f"{name}_stderr,{how}")
    return f"{value:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")
