"""Teach a language model to think before it speaks (Quiet-STaR, arXiv 2403.09629).

>>> from qstar import train
>>> result = train(model="HuggingFaceTB/SmolLM2-135M", dataset="open-web-math/open-web-math", max_steps=1000)

Nothing here imports torch before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qstar.evaluation import evaluate
    from qstar.losses import Objective
    from qstar.model import load, wrap
    from qstar.trainer import QuietStarArguments, QuietStarTrainer, TrainResult
    from qstar.training import train

__version__ = "0.1.0"
_HOME = {
    "Objective": "losses",
    "QuietStarArguments": "trainer",
    "QuietStarTrainer": "trainer",
    "TrainResult": "trainer",
    "evaluate": "evaluation",
    "load": "model",
    "train": "training",
    "wrap": "model",
}
__all__ = [
    "Objective",
    "QuietStarArguments",
    "QuietStarTrainer",
    "TrainResult",
    "evaluate",
    "load",
    "train",
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
