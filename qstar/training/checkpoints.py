"""Checkpoints that a kill has not cut short."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger(__name__)


def is_finished(checkpoint: Path, max_steps: int, epochs: float) -> bool:
    """Whether a run that ends after ``max_steps``, or after ``epochs`` where that is not above 0, has no step left."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    if max_steps > 0:
        return bool(state["global_step"] >= max_steps)
    return bool(state["epoch"] is not None and state["epoch"] >= epochs)


def last_whole_checkpoint(folder: str | Path) -> Path | None:
    """The latest checkpoint in ``folder`` that no kill cut short; None if there is none."""

    def step(checkpoint: Path) -> int:
        number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        return int(number) if number.isdecimal() else -1

    for checkpoint in sorted(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step, reverse=True):
        try:
            json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("%s was cut short and is left out", checkpoint)
        else:
            return checkpoint
    return None
