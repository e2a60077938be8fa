"""What the commands that generate share: flags made of settings, a model that is ready, and what a terminal can do."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO, get_args, get_origin, get_type_hints

import torch
from torch import nn
from transformers import CONFIG_NAME, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from qstar.classes import ThinkingModel
from qstar.config import CONFIG_FILE, setting_names
from qstar.data.load import check_name
from qstar.wrapping import load

COLUMNS = ("question_column", "answer_column", "choices_column", "labels_column", "rationale_column")


def add_settings(parser: argparse.ArgumentParser, kind: Any) -> None:
    """A flag for each field of a dataclass of settings; what may be true or false has ``--no-`` as well.

    Not of HfArgumentParser, whose flags that may be true or false would take a folder behind them for their value.
    """
    group = parser.add_argument_group(kind._argument_group_name)
    hints = get_type_hints(kind)
    for each in fields(kind):
        text = each.metadata["help"]
        if each.default not in (None, ()):
            text += f" (default: {each.default})"
        group.add_argument(
            f"--{each.name.replace('_', '-')}",
            default=argparse.SUPPRESS,  # what was not typed is left to the settings
            help=text.replace("%", "%%"),
            **_options(hints[each.name]),
        )


def add_columns(parser: argparse.ArgumentParser) -> None:
    """A flag for each column of a file of questions, see :func:`qstar.evaluation.tasks.find_task`."""
    for column in COLUMNS:
        flag, what = column.replace("_", "-"), column.replace("_", " ")
        parser.add_argument(f"--{flag}", default=argparse.SUPPRESS, help=f"The {what} of a file of questions.")


def taken_columns(options: dict[str, Any]) -> dict[str, str]:
    """The columns, out of the options that were given."""
    return {each: options.pop(each) for each in COLUMNS if each in options}


def _options(hint: Any) -> dict[str, Any]:
    """What argparse is told of a type."""
    if get_origin(hint) is tuple:
        return {"action": "append", "metavar": "TEXT"}
    [plain] = [each for each in get_args(hint) or (hint,) if each is not type(None)]
    return {"action": argparse.BooleanOptionalAction} if plain is bool else {"type": plain}


def taken(options: dict[str, Any], kind: Any) -> Any:
    """The settings of a kind, out of the options that were given."""
    names = setting_names(kind)
    return kind(**{name: options.pop(name) for name in list(options) if name in names})


def ready_model(folder: Path) -> tuple[ThinkingModel, PreTrainedTokenizerBase]:
    """What :func:`qstar.load` finds in ``folder``, on a GPU where there is one."""
    model, tokenizer = load(folder)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    return model.eval(), tokenizer


def any_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """:func:`ready_model`, or a model that never learned to think: the one in a folder, or of that name on the hub.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model or its tokenizer cannot be read; the hub cannot have such a name.
    """
    folder = Path(name)
    if (folder / CONFIG_FILE).is_file() or (folder.is_dir() and not (folder / CONFIG_NAME).is_file()):
        return ready_model(folder)
    check_name(name, "model")
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    return model.eval(), tokenizer


def takes_codes(stream: TextIO) -> bool:
    """Whether escape codes may be written: to a terminal, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def write_out(piece: str) -> None:
    """Write to standard output, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()
