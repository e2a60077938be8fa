"""A run up to its first step: settings that are checked, a model that thinks, its tokenizer and rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from qstar.adapters import has_adapters, holds_adapters, stored_base
from qstar.compatibility import check_kind
from qstar.config import CONFIG_FILE, SIZES, ThoughtSettings, check_names, setting_names
from qstar.data import AnyDataset, read_rows, read_texts
from qstar.data.load import check_name
from qstar.model import QuietStarModel
from qstar.quantized import check_learnable
from qstar.training.parallelism import reading_whole
from qstar.training.settings import QuietStarArguments
from qstar.wrapping import load, wrap


@dataclass(frozen=True)
class Prepared:
    """A run up to its first step."""

    model: QuietStarModel
    tokenizer: PreTrainedTokenizerBase
    args: QuietStarArguments
    rows: AnyDataset
    held_out: AnyDataset | None


def prepare(
    folder: Path,
    model: str | Path | PreTrainedModel,
    dataset: str | Path | AnyDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    eval_dataset: str | Path | AnyDataset | None,
    thoughts: dict[str, Any],
    settings: dict[str, Any],
) -> Prepared:
    """Read and resolve what :func:`qstar.train` is given, for a run in ``folder``; the settings as split by its names.

    Raises:
        ValueError, FileNotFoundError: as :func:`qstar.train`.
    """
    if isinstance(model, nn.Module):
        check_kind(model)
    named = model.name_or_path if isinstance(model, PreTrainedModel) else model
    if named and Path(named).resolve() == folder.resolve():
        raise ValueError(f"output_dir is {str(folder)!r}, but the model is there: training would write over it")
    args = QuietStarArguments(output_dir=str(folder), **settings)
    args.check_documents(dataset, eval_dataset)
    for name, value, default in (("eval_split", args.eval_split, "test"), ("eval_config", args.eval_config, None)):
        if eval_dataset is None and value != default:
            raise ValueError(f"{name} is {value!r}, but there is no eval_dataset that it could be of")
    if eval_dataset is None and args.inspect_steps:
        raise ValueError(f"inspect_steps is {args.inspect_steps}, but there is no eval_dataset whose texts to inspect")
    set_seed(args.seed)
    check_model_name(model)
    texts = read_texts(dataset, args.dataset_split, args, args.dataset_config)
    if isinstance(texts, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, but a streamed dataset has no length: give the steps to train for"
        )
    held_texts = None
    if eval_dataset is not None:
        held_texts = read_texts(eval_dataset, args.eval_split, args, args.eval_config, "eval_dataset")
    check_quantization(model, args)
    with reading_whole(args):
        thinking, tokenizer = open_model(model, tokenizer, thoughts)
    if args.lora:
        thinking.add_adapter(args.lora_config())
    args.check_rate(thinking)
    rows = read_rows(texts, tokenizer, args, dataset)
    if isinstance(rows, IterableDataset):
        rows = rows.repeat(None)  # one pass without end: a run that is resumed beyond the first finds its place
    held_out = None if held_texts is None else read_rows(held_texts, tokenizer, args, eval_dataset, "eval_dataset")
    return Prepared(thinking, tokenizer, args, rows, held_out)


def split_settings(call: str, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that ``call`` was given by name, as those of the thoughts and those of the training.

    None stands for the default of a size of the thoughts or of the batch.

    Raises:
        TypeError: a setting that does not exist.
        ValueError: one that is given twice, or a wrong value of the thoughts.
    """
    of_thoughts, of_training = setting_names(ThoughtSettings), setting_names(QuietStarArguments)
    check_names(call, settings, of_thoughts | of_training | {"batch_size"})
    optional = (*SIZES, "batch_size")
    settings = {name: value for name, value in settings.items() if value is not None or name not in optional}
    if "batch_size" in settings:
        if "per_device_train_batch_size" in settings:
            raise ValueError("batch_size is another name for per_device_train_batch_size, but both are given")
        settings["per_device_train_batch_size"] = settings.pop("batch_size")
    thoughts = {name: settings.pop(name) for name in list(settings) if name in of_thoughts}
    ThoughtSettings(**thoughts)  # which checks the values, before anything is read or trained
    return thoughts, settings


def check_model_name(model: str | Path | PreTrainedModel) -> None:
    """Refuse a model's name that is no folder here and could be none on the hub, before anything is read.

    Raises:
        FileNotFoundError: as it says.
        NotADirectoryError: it is a file.
    """
    if isinstance(model, PreTrainedModel) or Path(model).is_dir():
        return
    if Path(model).exists():
        raise NotADirectoryError(f"model is {str(model)!r}, but it must be a folder or a hub name, and this is a file")
    check_name(model, "model")


def check_quantization(model: str | Path | PreTrainedModel, args: QuietStarArguments) -> None:
    """Refuse a model that cannot learn since its weights are quantised, before they are read.

    Raises:
        ValueError: as :func:`qstar.quantized.check_learnable`.
    """
    if isinstance(model, PreTrainedModel):
        config, lora = model.config, bool(args.lora) or has_adapters(model)
    elif holds_adapters(model):
        name, revision = stored_base(model)
        config, lora = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False), True
    else:
        config, lora = AutoConfig.from_pretrained(model, trust_remote_code=False), bool(args.lora)
    check_learnable(config, lora=lora, device=args.device.type)


def open_model(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, thoughts: dict[str, Any]
) -> tuple[QuietStarModel, PreTrainedTokenizerBase]:
    """A model that thinks, from a name, a folder or a model object; the weights of a named one in float32.

    Raises:
        ValueError: as :func:`read_model`; or what :func:`qstar.wrap` refuses.
    """
    opened, tokenizer = read_model(model, tokenizer)
    if not isinstance(opened, QuietStarModel):
        return wrap(opened, tokenizer, **thoughts), tokenizer
    if opened is model:
        opened.adopt_adapters()
    return resized(opened, thoughts), tokenizer


def read_model(
    model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model as it is, from a name, a folder or a model object, and its tokenizer; a named one in float32.

    Raises:
        ValueError: its weights are a pickle that could run code; the model object has no name to find a tokenizer by.
    """
    if not isinstance(model, PreTrainedModel):
        try:
            if (Path(model) / CONFIG_FILE).is_file():
                loaded, stored = load(model, dtype=torch.float32)
                return loaded, tokenizer or stored
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)
            return plain, tokenizer
        except UnpicklingError as error:  # whose own words advise to read it all the same
            raise ValueError(
                f"model is {str(model)!r}, but its weights are a pickle that holds more than tensors: it is not read, "
                "since that could run any code"
            ) from error
    if tokenizer is None:
        if not model.name_or_path:
            raise ValueError("tokenizer is missing: the model object has no name to find it by")
        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
    return model, tokenizer


def resized(model: QuietStarModel, thoughts: dict[str, Any]) -> QuietStarModel:
    """A model that thinks already, with other lengths where some are given: no parameter depends on them.

    Raises:
        ValueError: another setting that differs from what the model was made with.
    """
    for name, value in thoughts.items():
        made_with = getattr(model.qstar, name)
        if name not in SIZES and value != made_with:
            raise ValueError(f"{name} is {value!r}, but the model was made with {made_with!r}: leave it out")
    model.qstar = replace(model.qstar, **thoughts)
    return model
