"""``qstar eval``: held-out log-likelihood of a trained model, with and without thoughts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import HfArgumentParser

from qstar.data import DataSettings
from qstar.data.load import check_name
from qstar.evaluation.held_out import evaluate
from qstar.evaluation.tables import evaluation_table, finite_or_none
from qstar.wrapping import load


def run(arguments: list[str]) -> None:
    """Evaluate as the arguments say, print the table and write the numbers as JSON."""
    parser = HfArgumentParser(
        cast(Any, DataSettings),
        prog="qstar eval",
        description="Held-out log-likelihood of a trained model, with and without thoughts.",
    )
    parser.add_argument("folder", type=Path, help="What `qstar train` wrote.")
    parser.add_argument("--dataset", required=True, help="Hub name, folder, or .txt, .jsonl, .json or .parquet file.")
    parser.add_argument("--split", default="test", help="Split of a hub dataset.")
    parser.add_argument("--batch-size", type=int, default=8, help="Rows at a time.")
    parser.add_argument("--max-rows", type=int, help="Stop after so many rows.")
    parser.add_argument("--temperature", type=float, default=0.0, help="Sample thoughts at it; 0 is greedy.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of sampled thoughts.")
    parser.add_argument("--output", type=Path, help="Where to write the result; FOLDER/eval.json if not given.")
    for action in parser._actions:
        if action.default is None:
            action.default = argparse.SUPPRESS  # no default to show
    options = vars(parser.parse_args(arguments))
    folder, output = options.pop("folder"), options.pop("output", None)

    check_name(options["dataset"], "dataset")
    model, tokenizer = load(folder)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    result = evaluate(model, tokenizer, **options)
    print(evaluation_table(result))
    path = output or folder / "eval.json"
    record = finite_or_none({"dataset": options["dataset"], **result.summary(), **asdict(result)})
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    print(f"written to {path}")
