"""The training in a round of STaR: a copy of the original model, on texts of which the question is not learned."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_callback import ProgressCallback

from qstar.ancestors.settings import StarSettings
from qstar.config import CONFIG_FILE
from qstar.data import PadRight
from qstar.model import QuietStarModel
from qstar.training.callbacks import ProgressLine
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import load

TRAINING_FILE = "training.json"


def fine_tune(
    original: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    settings: StarSettings,
    steps: int,
    folder: Path,
) -> float:
    """Train a copy of ``original`` and leave it in ``folder``, which is whole or not there; returns the mean loss.

    A plain model learns by transformers' Trainer, one that thinks by :class:`qstar.QuietStarTrainer`. The same call
    gives the same weights, bit for bit. What is in ``folder`` already is left as it is.

    Args:
        original: is not changed.
        tokenizer: is saved beside the model.
        rows: ``input_ids`` and ``labels``.
        settings: of the training.
        steps: to train for.
        folder: of the trained model.
    """
    if (folder / TRAINING_FILE).is_file():
        return float(json.loads((folder / TRAINING_FILE).read_text())["loss"])
    beside = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    model = copy.deepcopy(original)
    memory: dict[str, Any] = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    args = QuietStarArguments(
        output_dir=str(folder.parent),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.0,
        per_device_train_batch_size=settings.train_batch_size,
        bf16=settings.bf16,
        seed=settings.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=steps,
        sample_steps=0,
        gradient_norm_steps=0,
        **memory,
    )
    kind = cast(Any, QuietStarTrainer if isinstance(model, QuietStarModel) else Trainer)
    collator = PadRight(tokenizer.pad_token_id or 0)
    trainer = kind(model, args, train_dataset=rows, data_collator=collator, processing_class=tokenizer)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ProgressLine)
    loss = float(trainer.train().training_loss)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    (beside / TRAINING_FILE).write_text(json.dumps({"steps": steps, "loss": loss}) + "\n")
    os.replace(beside, folder)
    return loss


def read_trained(folder: Path) -> PreTrainedModel:
    """The model that :func:`fine_tune` left, as it was trained, on a GPU where there is one."""
    if (folder / CONFIG_FILE).is_file():
        model: PreTrainedModel = load(folder, dtype="auto")[0]
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    return model.eval()
