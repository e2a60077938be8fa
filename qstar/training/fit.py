"""A run of the Trainer from rows to a saved model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qstar.cpu import keep_freed_memory
from qstar.data import AnyDataset
from qstar.model import QuietStarModel
from qstar.training.checkpoints import last_whole_checkpoint
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_args.json"


@dataclass
class TrainResult:
    """What :func:`qstar.train` brings back.

    Attributes:
        model: the trained model.
        tokenizer: its tokenizer.
        metrics: numbers by name; of the embedded default also its held-out table.
        folder: where the model, the tokenizer and the settings lie; :func:`qstar.load` reads it.
    """

    model: QuietStarModel
    tokenizer: PreTrainedTokenizerBase
    metrics: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()


def fit(
    model: QuietStarModel,
    tokenizer: PreTrainedTokenizerBase,
    args: QuietStarArguments,
    rows: AnyDataset,
    held_out: AnyDataset | None = None,
    resume_from_checkpoint: bool | str | Path | None = None,
) -> dict[str, Any]:
    """Train on packed rows, save model, tokenizer and settings into ``args.output_dir``, and return the metrics."""
    if args.device.type == "cpu":
        keep_freed_memory()
    if resume_from_checkpoint is True:
        resume_from_checkpoint = last_whole_checkpoint(args.folder)
        if resume_from_checkpoint is None:
            logger.warning("%s holds no whole checkpoint: training begins at the beginning", args.output_dir)
    trainer = QuietStarTrainer(model, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
    outcome = trainer.train(resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint else None)
    trainer.save_model()
    trainer.save_state()
    if held_out is not None and args.eval_strategy == "no":
        trainer.evaluate()
    if trainer.is_world_process_zero():
        (args.folder / SETTINGS_FILE).write_text(args.to_json_string() + "\n")
    logged = {name: value for record in trainer.state.log_history for name, value in record.items()}
    return {**logged, **outcome.metrics}
