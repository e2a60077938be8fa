"""The whole job in one call: model, data, training, and a folder with the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qstar.data import AnyDataset
from qstar.training.card import Sources
from qstar.training.fit import TrainResult, fit
from qstar.training.folders import run_folder
from qstar.training.prepare import prepare, split_settings


def train(
    model: str | Path | PreTrainedModel | None = None,
    dataset: str | Path | AnyDataset | None = None,
    *,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_dataset: str | Path | AnyDataset | None = None,
    resume_from_checkpoint: bool | str | Path | None = None,
    **settings: Any,
) -> TrainResult:
    """Teach a language model to think before it speaks.

    Args:
        model: a hub name, a folder (also of an earlier :func:`train`) or a model object.
        dataset: a hub name (streamed), a ``.txt``, ``.jsonl``, ``.json`` or ``.parquet`` file, a folder or an object of
            ``datasets``; see :func:`qstar.data.load_texts`.
        output_dir: folder for the result; by default the first free one of ``runs/quiet-star``,
            ``runs/quiet-star-2``, ...
        tokenizer: of a model object; found by the model's name by default.
        eval_dataset: held-out text, evaluated as ``eval_strategy`` says, or at the end.
        resume_from_checkpoint: go on with the last checkpoint in ``output_dir`` that is whole, every file as it was
            written, from the beginning if there is none (True), or with a given one.
        settings: any field of :class:`qstar.config.ThoughtSettings` (``thought_tokens``, ``ahead_tokens``,
            ``rationales``, ``sigmoid``, ``start_init``, ...) and of :class:`qstar.QuietStarArguments`, and so of
            ``TrainingArguments`` (``learning_rate``, ``seq_length``, ``seed``, ``text_column``, ``max_steps``, ...);
            ``batch_size`` is another name for ``per_device_train_batch_size``. ``lora=True``, or a
            ``peft.LoraConfig``, trains adapters beside the frozen model; :func:`qstar.merge_adapters` merges them.

    Returns:
        The model, its tokenizer, the metrics and the folder.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: model or dataset is missing; a setting with a wrong value, or one that would be ignored; a model
            that cannot think; data that cannot be read, or hold no token to predict; a given checkpoint with a file
            that is not as it was written.
        FileNotFoundError: model or dataset is neither here nor a name that the hub has or could have.
        FileExistsError: ``output_dir`` holds an earlier run.
        BlockingIOError: another run is in ``output_dir`` at this time.
        FloatingPointError: the loss or a gradient is not finite, as ``on_nonfinite`` says.
        OutOfMemory: a step or an evaluation does not fit in memory, with the settings to lower.
        SystemExit: SIGINT (Ctrl-C) or SIGTERM came, and a checkpoint was saved, see :func:`qstar.training.fit.fit`.
    """
    thoughts, settings = split_settings("train()", settings)
    if model is None or dataset is None:
        missing = "model" if model is None else "dataset"
        raise ValueError(f"{missing} is missing: give a model and a dataset (qstar.train_embedded() needs neither)")
    with run_folder(output_dir, resume_from_checkpoint) as folder:
        run = prepare(folder, model, dataset, tokenizer, eval_dataset, thoughts, settings)
        sources = Sources.of(model, dataset, eval_dataset)
        metrics = fit(run.model, run.tokenizer, run.args, run.rows, run.held_out, resume_from_checkpoint, sources)
        return TrainResult(run.model, run.tokenizer, metrics, folder)
