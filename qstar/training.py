"""The whole job in one call: model, data, training, and a folder with the result."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qstar.data import AnyDataset, load_texts, pack
from qstar.embedded.run import run_embedded
from qstar.model import CONFIG_FILE, QuietStarMixin, load, wrap
from qstar.trainer import METRICS_FILE, QuietStarArguments, TrainResult, fit


def train(
    model: str | Path | PreTrainedModel | None = None,
    dataset: str | Path | AnyDataset | None = None,
    *,
    output_dir: str | Path | None = None,
    thought_tokens: int | None = None,
    ahead_tokens: int | None = None,
    rationales: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_dataset: str | Path | AnyDataset | None = None,
    batch_size: int | None = None,
    resume_from_checkpoint: bool | str | None = None,
    **settings: Any,
) -> TrainResult:
    """Teach a language model to think before it speaks.

    Without ``model`` and ``dataset`` this runs the embedded default: a small built-in decoder on a task on which
    thoughts help, with no network and no GPU (see :mod:`qstar.embedded`).

    Args:
        model: a hub name, a folder (also of an earlier :func:`train`) or a model object.
        dataset: a hub name (streamed), a ``.txt``, ``.jsonl``, ``.json`` or ``.parquet`` file, a ``datasets`` object.
        output_dir: folder for the result; by default the first free one of ``runs/quiet-star``,
            ``runs/quiet-star-2``, ...
        thought_tokens: K, sampled tokens in a thought; 8 by default.
        ahead_tokens: m, text tokens that a thought is scored on; 4 by default.
        rationales: r, thoughts at each position; 2 by default.
        tokenizer: of a model object; found by the model's name by default.
        eval_dataset: held-out text, evaluated as ``eval_strategy`` says, or at the end.
        batch_size: rows in a batch, on each device; another name for ``per_device_train_batch_size``.
        resume_from_checkpoint: go on with the last checkpoint in ``output_dir`` that a kill has not cut short, from the
            beginning if there is none (True), or with a given one.
        settings: any field of :class:`qstar.trainer.QuietStarArguments`, and so of ``TrainingArguments``:
            ``learning_rate``, ``seq_length``, ``seed``, ``text_column``, ``max_steps``, ...

    Returns:
        The model, its tokenizer, the metrics and the folder.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: a setting with a wrong value, or a model that cannot think.
        FileExistsError: ``output_dir`` holds an earlier run.
    """
    known = {setting.name for setting in fields(QuietStarArguments)}
    for name in settings.keys() - known:
        close = difflib.get_close_matches(name, [*known, *train.__kwdefaults__], n=1)
        raise TypeError(f"train() has no setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    if batch_size is not None:
        settings["per_device_train_batch_size"] = batch_size
    sizes = dict(thought_tokens=thought_tokens, ahead_tokens=ahead_tokens, rationales=rationales)
    sizes = {name: size for name, size in sizes.items() if size is not None}
    folder = _output_folder(output_dir, resume_from_checkpoint)

    if model is None and dataset is None:
        given = dict(tokenizer=tokenizer, eval_dataset=eval_dataset, resume_from_checkpoint=resume_from_checkpoint)
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} is {value!r}, but the embedded default takes none: give model and dataset as well"
                )
        return run_embedded(folder, sizes, settings)
    if model is None or dataset is None:
        missing, given = ("model", "dataset") if model is None else ("dataset", "model")
        raise ValueError(f"{missing} is missing: give it beside {given}, or neither for the embedded default")

    args = QuietStarArguments(output_dir=str(folder), **settings)
    set_seed(args.seed)
    model, tokenizer = open_model(model, tokenizer, sizes)
    rows = pack(load_texts(dataset), tokenizer, args.seq_length, args.text_column)
    if isinstance(rows, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, but a streamed dataset has no length: give the steps to train for"
        )
    held_out = None
    if eval_dataset is not None:
        held_out = pack(load_texts(eval_dataset, "test"), tokenizer, args.seq_length, args.text_column)
    metrics = fit(model, tokenizer, args, rows, held_out, resume_from_checkpoint)
    return TrainResult(model, tokenizer, metrics, folder)


def open_model(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, sizes: dict[str, int]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that thinks, from a name, a folder or a model object; the weights of a named one in float32."""
    if not isinstance(model, PreTrainedModel):
        if (Path(model) / CONFIG_FILE).is_file():
            loaded, stored = load(model, dtype=torch.float32)
            return _resized(loaded, sizes), tokenizer or stored
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError("tokenizer is missing: the model object has no name to find it by")
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    if isinstance(model, QuietStarMixin):
        return _resized(model, sizes), tokenizer
    return wrap(model, tokenizer, **sizes), tokenizer


def _resized(model: PreTrainedModel, sizes: dict[str, int]) -> PreTrainedModel:
    """A model that thinks already, with other lengths where some are given: no parameter depends on them."""
    model.qstar = type(model.qstar)(**(vars(model.qstar) | sizes))
    return model


def _output_folder(output_dir: str | Path | None, resume: bool | str | None) -> Path:
    if output_dir is not None:
        folder = Path(output_dir)
        if not resume and (folder / METRICS_FILE).exists():
            raise FileExistsError(
                f"output_dir is {str(folder)!r}, but it holds an earlier run: go on with it by "
                "resume_from_checkpoint=True, or choose another folder"
            )
        return folder
    default = Path("runs/quiet-star")
    if resume:
        return default
    folder, number = default, 1
    while folder.exists():
        number += 1
        folder = default.with_name(f"{default.name}-{number}")
    return folder
