"""A run of the Trainer from rows to a saved model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from qstar.adapters import has_adapters
from qstar.cpu import keep_freed_memory
from qstar.data import AnyDataset
from qstar.model import QuietStarModel, vocabulary_size
from qstar.training.card import Sources
from qstar.training.curves import CURVES_FILE, can_draw, draw, read_metrics
from qstar.training.savable import check_savable
from qstar.training.saving import SETTINGS_FILE
from qstar.training.settings import QuietStarArguments
from qstar.training.stopping import StopWithCheckpoint
from qstar.training.trainer import METRICS_FILE, QuietStarTrainer

logger = logging.getLogger(__name__)


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
    sources: Sources | None = None,
) -> dict[str, Any]:
    """Train on packed rows, leave all that a run leaves in ``args.output_dir``, and return the metrics.

    ``sources`` are what the run began with, for its model card.

    Raises:
        ValueError, OSError: the model could not be saved there, see :func:`qstar.training.savable.check_savable`.
        ValueError: a given checkpoint is not as it was written.
        FloatingPointError: the loss or a gradient is not finite, as ``on_nonfinite`` says.
        OutOfMemory: a step or an evaluation does not fit in memory, with the settings to lower.
        SystemExit: SIGINT (Ctrl-C, code 130) or SIGTERM (143) came, and a checkpoint was saved after the step at hand;
            with ``save_strategy="no"`` the signals do what they do elsewhere.
    """
    if args.device.type == "cpu":
        keep_freed_memory()
    check_savable(model, args.folder)
    trainer = QuietStarTrainer(model, args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
    trainer.sources = sources or Sources()
    stop = StopWithCheckpoint()
    if args.save_strategy == "no":
        trained = trainer.train(resume_from_checkpoint).metrics
    else:
        trainer.add_callback(stop)
        with stop.listening():
            trained = trainer.train(resume_from_checkpoint).metrics
    if stop.received:
        name, step = Signals(stop.received).name, trainer.state.global_step
        logger.warning("stopped by %s: %s goes on from here", name, args.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}")
        raise SystemExit(128 + stop.received)
    trainer.save_model(_internal_call=True)  # which pushes nothing to the hub, before all is there
    if not has_adapters(model):  # what the folder holds from now on could be the base of some
        model.name_or_path, model.qstar_base_vocabulary = str(args.folder), vocabulary_size(model)
    trainer.save_state()
    if held_out is not None and args.eval_strategy == "no":
        trainer.evaluate()
    if trainer.is_world_process_zero():
        (args.folder / SETTINGS_FILE).write_text(args.to_json_string() + "\n")
        if args.curves and not can_draw():
            logger.warning("no curves are drawn, since matplotlib is missing: pip install matplotlib")
        elif args.curves:
            draw(read_metrics(args.folder / METRICS_FILE), args.folder / CURVES_FILE)
    if args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.create_model_card()
    logged = {name: value for record in trainer.state.log_history for name, value in record.items()}
    return {**logged, **trained}
