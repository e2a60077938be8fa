"""A variant of the base, trained on the text, with what it cost."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from transformers import set_seed

from common.deadline import Deadline, OutOfTime, StopInTime
from common.folders import made_with, write_json
from common.operations import Sizes, equal_steps, plain_row, thinking_row
from qstar.cpu import keep_freed_memory
from qstar.embedded.run import PlainTrainer
from qstar.model import QuietStarModel
from qstar.training.settings import UNSEEN, QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from real.settings import EQUAL_OPERATIONS, VARIANTS, RealModelSettings
from real.sources import Sources

MODEL_FOLDER = "model"
TRAINING_FILE = "training.json"
QUIET: dict[str, Any] = UNSEEN | dict(gradient_norm_steps=0, curves=False, report_to="none", save_total_limit=1)


def steps_of(name: str, model: QuietStarModel, settings: RealModelSettings) -> int:
    """The updates of a variant; ``model`` has the thoughts of ``rlp``, with which plain training is made equal."""
    if name != EQUAL_OPERATIONS:
        return settings.steps
    return equal_steps(
        model,
        steps=settings.steps,
        rows=settings.batch_size,
        plain_rows=settings.equal_operations_batch_size,
        length=settings.seq_length,
        scored=1.0,
        positions=settings.positions_per_row,
    )


def train_variant(
    folder: Path, name: str, seed: int, sources: Sources, *, checkpoint_steps: int, deadline: Deadline
) -> None:
    """Train a variant into ``folder``: the model, its log, and last ``training.json``, which says that it is done.

    Args:
        folder: of this variant and seed.
        name: of the variant.
        seed: of the order of the text, and of the thoughts.
        sources: of the base and the text.
        checkpoint_steps: write a checkpoint every so many steps, from which training goes on; 0 for none.
        deadline: at which it stops.

    Raises:
        OutOfTime: it did not come to its end.
    """
    variant, settings = VARIANTS[name], sources.settings
    model = sources.base(variant)
    steps = steps_of(name, model, settings)
    rows = settings.equal_operations_batch_size if name == EQUAL_OPERATIONS else settings.batch_size
    saving: dict[str, Any] = dict(save_strategy="steps" if checkpoint_steps else "no", save_steps=checkpoint_steps or 1)
    if not checkpoint_steps:  # what a run without checkpoints has left is of no use
        for left in (*folder.glob("checkpoint-*"), folder / MODEL_FOLDER):
            shutil.rmtree(left, ignore_errors=True)
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    args = QuietStarArguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows,
        max_steps=steps,
        warmup_steps=round(settings.warmup_ratio * steps),
        logging_steps=max(1, steps // 20),
        seed=seed,
        **(QUIET | saving | settings.training_of(variant)),
    )
    if args.device.type == "cpu":
        keep_freed_memory()
    set_seed(seed)
    trainer = (QuietStarTrainer if variant.thinks else PlainTrainer)(
        model, args, train_dataset=sources.training_rows, processing_class=sources.tokenizer
    )
    trainer.add_callback(StopInTime(deadline))
    began = time.monotonic()
    trainer.train(True if checkpoint_steps else None)
    seconds = time.monotonic() - began
    if trainer.state.global_step < steps:
        raise OutOfTime(f"{name}, seed {seed}: stopped after {trainer.state.global_step} of {steps} steps")
    model.save_pretrained(folder / MODEL_FOLDER)
    sources.tokenizer.save_pretrained(folder / MODEL_FOLDER)
    scored, positions = 1.0 if args.signed_advantages else 0.5, settings.positions_per_row
    each = thinking_row(model, settings.seq_length, scored=scored, positions=positions)
    record = {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "rows": steps * rows,
        "tokens": steps * rows * settings.seq_length,
        "multiply_adds": steps * rows * (each if variant.thinks else plain_row(Sizes.of(model), settings.seq_length)),
        "seconds": round(seconds, 1),
        "thoughts": settings.thoughts_of(variant) if variant.thinks else None,
        "training": settings.training_of(variant),
        "log": trainer.state.log_history,
    }
    write_json(folder / TRAINING_FILE, record | made_with())
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
