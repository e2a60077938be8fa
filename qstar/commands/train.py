"""``qstar train``: every field of the settings is a flag; without a model and a dataset, the embedded default."""

from __future__ import annotations

import argparse
from typing import Any, cast

from transformers import HfArgumentParser

from qstar.config import ThoughtSettings
from qstar.embedded.run import train_embedded
from qstar.training.run import train
from qstar.training.settings import QuietStarArguments, RunSettings


def run(arguments: list[str]) -> None:
    """Train as the arguments say."""
    parser = HfArgumentParser(
        cast(Any, [RunSettings, ThoughtSettings, QuietStarArguments]),
        prog="qstar train",
        usage="qstar train [--model NAME --dataset NAME] [--SETTING VALUE ...]",
        description="Train a model to think. Without --model and --dataset, runs the embedded default, with defaults "
        "of its own.",
    )
    first = [kind._argument_group_name for kind in (RunSettings, ThoughtSettings)]
    parser._action_groups.sort(key=lambda group: group.title not in first)  # a hundred settings come after them
    for action in parser._actions:
        if action.default not in (None, False, argparse.SUPPRESS):
            action.help = f"{action.help} (default: {action.default})".replace("%", "%%")
        action.default = argparse.SUPPRESS  # what was not typed is left to what is called: each has its own defaults
    given = vars(parser.parse_args(arguments))
    if given.pop("resume", False) and given.setdefault("resume_from_checkpoint", True) is not True:
        parser.error("--resume goes on with the last checkpoint, --resume_from_checkpoint with a given one: give one")
    result = train(**given) if {"model", "dataset"} & set(given) else train_embedded(**given)
    print(f"saved in {result.folder}")
