"""Teach a language model to think before it speaks (Quiet-STaR, arXiv 2403.09629).

>>> from qstar import train
>>> result = train(model="HuggingFaceTB/SmolLM2-135M", dataset="open-web-math/open-web-math", max_steps=1000)

Nothing here imports torch before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qstar.adapters import merge_adapters
    from qstar.ancestors.star import star
    from qstar.config import QuietStarConfig
    from qstar.embedded.run import train_embedded
    from qstar.evaluation.held_out import evaluate
    from qstar.evaluation.run import evaluate_tasks
    from qstar.inspection.run import inspect
    from qstar.learning import Objective
    from qstar.model import QuietStarModel
    from qstar.training.fit import TrainResult
    from qstar.training.run import train
    from qstar.training.settings import QuietStarArguments
    from qstar.training.trainer import QuietStarTrainer
    from qstar.wrapping import load, wrap

__version__ = "0.1.0"
_HOME = {
    "Objective": "learning",
    "QuietStarArguments": "training.settings",
    "QuietStarConfig": "config",
    "QuietStarModel": "model",
    "QuietStarTrainer": "training.trainer",
    "TrainResult": "training.fit",
    "evaluate": "evaluation.held_out",
    "evaluate_tasks": "evaluation.run",
    "inspect": "inspection.run",
    "load": "wrapping",
    "merge_adapters": "adapters",
    "star": "ancestors.star",
    "train": "training.run",
    "train_embedded": "embedded.run",
    "wrap": "wrapping",
}
__all__ = [
    "Objective",
    "QuietStarArguments",
    "QuietStarConfig",
    "QuietStarModel",
    "QuietStarTrainer",
    "TrainResult",
    "evaluate",
    "evaluate_tasks",
    "inspect",
    "load",
    "merge_adapters",
    "star",
    "train",
    "train_embedded",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
