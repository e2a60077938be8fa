"""The commands ``qstar train`` and ``qstar eval``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

USAGE = """usage: qstar [-h] {train,eval} ...

Teach a language model to think before it speaks (Quiet-STaR).

commands:
  train   train a model; without arguments, a small built-in one on a built-in task (minutes on a laptop)
  eval    held-out log-likelihood of a trained model, with and without thoughts

qstar COMMAND --help tells more.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 where it failed and 2 where its arguments are wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"{USAGE}\nqstar: unknown command {command!r}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except (OSError, TypeError, ValueError) as error:
        print(f"qstar {command}: {error}", file=sys.stderr)
        return 1
    return 0


def _train(arguments: list[str]) -> None:
    from transformers import HfArgumentParser

    from qstar.trainer import QuietStarArguments
    from qstar.training import train

    parser = HfArgumentParser(
        QuietStarArguments,
        prog="qstar train",
        description="Train a model to think. Without --model and --dataset, runs the embedded default.",
    )
    options = parser.add_argument_group("Quiet-STaR")
    options.add_argument("--model", help="hub name or folder")
    options.add_argument("--dataset", help="hub name, or a .txt, .jsonl, .json or .parquet file")
    options.add_argument(
        "--eval_dataset", "--eval-dataset", help="held-out text, evaluated as --eval_strategy says, or at the end"
    )
    options.add_argument("--thought_tokens", "--thought-tokens", type=int, help="K: sampled tokens in a thought (8)")
    options.add_argument("--ahead_tokens", "--ahead-tokens", type=int, help="m: text tokens a thought is scored on (4)")
    options.add_argument("--rationales", type=int, help="r: thoughts at each position (2)")
    options.add_argument("--batch_size", "--batch-size", type=int, help="rows in a batch, on each device (8)")
    options.add_argument(
        "--resume", dest="resume_from_checkpoint", action="store_true", help="go on with the last checkpoint"
    )
    for action in parser._actions:
        action.default = argparse.SUPPRESS  # what was not typed is left to train(): the embedded default has its own
    result = train(**vars(parser.parse_args(arguments)))
    print(f"saved in {result.folder}")


def _eval(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="qstar eval", description="Held-out log-likelihood of a trained model, with and without thoughts."
    )
    parser.add_argument("folder", type=Path, help="what `qstar train` wrote")
    parser.add_argument("--dataset", required=True, help="hub name, or a .txt, .jsonl, .json or .parquet file")
    parser.add_argument("--split", default="test", help="split of a hub dataset (test)")
    parser.add_argument("--text-column", default="text", help="column that holds the text (text)")
    parser.add_argument("--seq-length", type=int, default=256, help="text tokens in a row (256)")
    parser.add_argument("--batch-size", type=int, default=8, help="rows at a time (8)")
    parser.add_argument("--max-rows", type=int, help="stop after so many rows")
    parser.add_argument("--temperature", type=float, default=0.0, help="sample thoughts at it; 0 is greedy (0)")
    parser.add_argument("--seed", type=int, default=0, help="of sampled thoughts (0)")
    parser.add_argument("--output", type=Path, help="where to write the result (FOLDER/eval.json)")
    options = vars(parser.parse_args(arguments))
    folder, output = options.pop("folder"), options.pop("output")

    import torch

    from qstar.evaluation import evaluate
    from qstar.model import load
    from qstar.report import evaluation_table

    model, tokenizer = load(folder)
    if torch.cuda.is_available():
        model.cuda()
    result = evaluate(model, tokenizer, **options)
    print(evaluation_table(result))
    path = output or folder / "eval.json"
    path.write_text(json.dumps({"dataset": options["dataset"], **result.summary(), **asdict(result)}, indent=2) + "\n")
    print(f"written to {path}")


COMMANDS = {"train": _train, "eval": _eval}
