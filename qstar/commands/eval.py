"""``qstar eval``: held-out log-likelihood of a trained model, with and without thoughts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from qstar.evaluation.held_out import evaluate
from qstar.evaluation.tables import evaluation_table
from qstar.wrapping import load


def run(arguments: list[str]) -> None:
    """Evaluate as the arguments say, print the table and write the numbers as JSON."""
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

    model, tokenizer = load(folder)
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    result = evaluate(model, tokenizer, **options)
    print(evaluation_table(result))
    path = output or folder / "eval.json"
    path.write_text(json.dumps({"dataset": options["dataset"], **result.summary(), **asdict(result)}, indent=2) + "\n")
    print(f"written to {path}")
