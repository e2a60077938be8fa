"""``qstar train``: every field of the settings is a flag; without a model and a dataset, the embedded default."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, cast

from torch import distributed
from transformers import HfArgumentParser

from qstar.config import ThoughtSettings, setting_names
from qstar.embedded.run import SETTINGS, SIZES, train_embedded
from qstar.training.config_file import BOOLEANS, default_of, read_settings, typed_fields, written
from qstar.training.dry_run import dry_run
from qstar.training.prepare import split_settings
from qstar.training.run import train
from qstar.training.settings import PRESETS, QuietStarArguments, RunSettings

KINDS = (RunSettings, ThoughtSettings, QuietStarArguments)
SAME = (
    {"batch_size", "per_device_train_batch_size"},
    {"resume", "resume_from_checkpoint"},
    {"gradient_checkpointing", "activation_checkpointing"},
    {"gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"},
)  # names of one setting, so that a flag wins over a file by whichever name


def run(arguments: list[str]) -> None:
    """Train as the arguments say."""
    parser = _parser()
    flags = vars(parser.parse_args(arguments))
    config, printed = flags.pop("config", None), flags.pop("print_config", None)
    given = flags if config is None else merged(read_settings(config, KINDS), flags)
    tried = given.pop("dry_run", False)
    if printed is not None:
        print(config_of(given, full=printed == "full"), end="")
        return
    if given.pop("resume", False) and given.setdefault("resume_from_checkpoint", True) is not True:
        parser.error("--resume goes on with the last checkpoint, --resume_from_checkpoint with a given one: give one")
    check_checkpoint(given.get("resume_from_checkpoint"))
    if tried:
        if not names_a_run(given):
            raise ValueError("dry_run is given, but not a model and a dataset, whose first step could be tried")
        print(dry_run(**given))
        return
    try:
        result = train(**given) if names_a_run(given) else train_embedded(**given)
        print(f"saved in {result.folder}")
    except SystemExit as stop:  # after a signal, of which all processes know
        leave_together(stop.code)
        raise
    leave_together(0)


def leave_together(code: Any) -> None:
    """End this process when all that trained with it have come here; nothing where it trained alone.

    Not by an ordinary exit: the threads of gloo may abort a process there, or hang.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        cast(Any, KINDS),
        prog="qstar train",
        usage="qstar train [--model NAME --dataset NAME] [--config FILE] [--SETTING VALUE ...]",
        description="Train a model to think. Without --model and --dataset, runs the embedded default, with defaults "
        "of its own.",
    )
    first = [kind._argument_group_name for kind in (RunSettings, ThoughtSettings)]
    parser._action_groups.sort(key=lambda group: group.title not in first)  # a hundred settings come after them
    for action in parser._actions:
        if action.default not in (None, False, argparse.SUPPRESS):
            action.help = f"{action.help} (default: {action.default})".replace("%", "%%")
    [group] = [each for each in parser._action_groups if each.title == RunSettings._argument_group_name]
    group.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="Settings by their names, in a .yaml, .yml or .json file; flags win over it. Paths in it are relative to "
        "the working directory.",
    )
    instead = group.add_mutually_exclusive_group()
    instead.add_argument(
        "--print-config",
        nargs="?",
        const="changed",
        choices=["changed", "full"],
        help="Print the settings that are not the defaults, as a file for --config, or with `full` all of them and "
        "what they are, and do nothing else.",
    )
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="Take one step, say what it took and what the run would take, and keep nothing.",
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what was not typed is left to what is called: each has its own defaults
    return parser


def merged(of_file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file and those of flags, which win."""
    beaten = {name for names in SAME if names & flags.keys() for name in names}
    return {name: value for name, value in of_file.items() if name not in beaten} | flags


def check_checkpoint(folder: str | bool | None) -> None:
    """Refuse a truth value where the folder of a checkpoint must be, which transformers would take for its name."""
    if isinstance(folder, str) and folder.lower() in BOOLEANS and not Path(folder).exists():
        raise ValueError(
            f"resume_from_checkpoint is {folder!r}, but it must be the folder of a checkpoint; resume goes on with the "
            "last one"
        )


def names_a_run(given: dict[str, Any]) -> bool:
    """Whether the settings are of a run of one's own, and not of the embedded default."""
    return bool({"model", "dataset"} & given.keys())


def config_of(given: dict[str, Any], *, full: bool) -> str:
    """A file for ``--config`` with the settings that are given, see :func:`qstar.training.config_file.written`.

    A setting of the training that has its default is as good as not given. One of the thoughts is not, since a model
    that thinks already keeps its own where none is given; nor is ``output_dir``, whose default is the first free one.

    Raises:
        ValueError: a value that the run would refuse.
    """
    settings = {name: value for name, value in given.items() if name not in setting_names(RunSettings)}
    if given.get("batch_size") is not None:
        settings["batch_size"] = given["batch_size"]
    args = QuietStarArguments(**split_settings("qstar train", settings)[1])
    defaults = {each.name: default_of(each) for kind in KINDS for each, _ in typed_fields(kind)}
    defaults |= PRESETS[args.preset]
    if not names_a_run(given):
        defaults |= SIZES | SETTINGS
    usual = setting_names(QuietStarArguments) - {"output_dir"}
    changed = {name: x for name, x in given.items() if name not in usual or x != defaults[name]}
    return written(changed, defaults, KINDS, full=full)
