"""How much a model's thoughts help before it is trained, whatever weight a mixing head would give them.

    python experiments/constant_weights.py --model M --dataset TEXT --output-dir D [--weights 0.02 0.1 0.5 1]

The base of the experiment with a real model thinks about the held-out text, greedily, and each thought is mixed into
the prediction of the next token with one and the same weight. ``weights.json`` and ``weights.md`` hold the
log-likelihood less that without thoughts, over all tokens and by how hard the base finds them; the same for random
tokens in the place of thoughts. The flags are those of ``real_model.py`` that say what is read and how long a thought
is.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from common.folders import made_with, write_json
from common.markdown import markdown_table, with_interval
from qstar.evaluation.controls import random_tokens
from qstar.evaluation.intervals import Interval
from qstar.evaluation.text_scores import TextScores, score_text
from qstar.heads import MixingHead
from qstar.training.folders import alone_in
from qstar.whole_file import write_whole
from real.evaluate import precision
from real.measured import Difference, mean_of, quarters_of_text, sums_of_text
from real.settings import VARIANTS, RealModelSettings
from real.sources import Sources

WEIGHTS = (0.02, 0.1, 0.5, 1.0)
SIZES = ("seq_length", "thought_tokens", "held_out", "held_out_rows", "text_batch_size", "max_grid_tokens")
TEXT = ("text_column", "dataset_config")
ITS_THOUGHTS, RANDOM = "its thoughts", "random tokens"


@torch.no_grad()
def hold_weight(head: MixingHead, weight: float) -> None:
    """Let the head answer ``weight`` to whatever it reads."""
    head.hidden.weight.zero_()
    head.hidden.bias.fill_(1.0)
    head.output.weight.fill_(weight / head.output.weight.numel())


Scores = dict[tuple[str, float], TextScores]


def scores_by_weight(sources: Sources, weights: Sequence[float]) -> tuple[TextScores, Scores]:
    """Those of the held-out text without thoughts, and by what is read and its weight, the same at all weights."""
    model = sources.untrained(VARIANTS["rlp"])
    limit = sources.settings.max_grid_tokens or None
    head: Any = model.qstar_mixing_head
    with precision(sources):
        before = score_text(model, sources.held_out_batches, max_grid_tokens=limit)
    shapes = [(len(each), each.shape[1]) for each in before.thoughts]
    read = {ITS_THOUGHTS: before.thoughts, RANDOM: random_tokens(model, sources.tokenizer, shapes, 0)}
    found = {}
    for weight in weights:
        hold_weight(head, weight)
        with precision(sources):  # entered anew: autocast keeps the weights that it has rounded until it is left
            for name, thoughts in read.items():
                options: Any = dict(thoughts=thoughts, max_grid_tokens=limit)
                found[name, weight] = score_text(model, sources.held_out_batches, **options)
    return before, found


def gains(before: TextScores, found: Scores) -> tuple[tuple[str, ...], dict[tuple[str, float], Difference]]:
    """What each adds to the log-likelihood of a token, over all tokens and by difficulty, and the names of these."""
    rows, base = before.row.numpy(), before.without.double().numpy()
    groups, quarter = quarters_of_text(rows, base)
    differences = {}
    for key, scores in found.items():
        assert scores.after is not None
        sums = sums_of_text(scores.after.double().numpy() - base, rows, quarter)
        differences[key] = mean_of(sums, groups.counts)
    return groups.names, differences


def a_weight(text: str) -> float:
    """A weight, out of a flag."""
    weight = float(text)
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"a weight is {text!r}, but it must be a finite number")
    return weight


def write(sources: Sources, weights: Sequence[float], output: Path) -> str:
    """Score the text, write the two files, and return the table."""
    before, found = scores_by_weight(sources, weights)
    names, differences = gains(before, found)
    settings = {name: getattr(sources.settings, name) for name in (*SIZES, *TEXT, "eval_bf16")}
    record = {
        "settings": {"model": sources.model, "dataset": sources.dataset} | settings,
        "tokens": len(before.row),
        "groups": names,
        "gains": [{"reads": reads, "weight": weight} | each.as_json() for (reads, weight), each in differences.items()],
    }
    write_json(output / "weights.json", record | made_with())
    rows = [
        [f"{weight:g}", reads, *map(_cell, each.means, each.intervals)]
        for (reads, weight), each in sorted(differences.items())
    ]
    tables = markdown_table(["weight", "reads", *names], rows) + "\n"
    write_whole(output / "weights.md", tables)
    return tables


def _cell(mean: float, interval: Interval) -> str:
    return with_interval(mean, interval, sign="+")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hub name or folder of the base.")
    parser.add_argument("--dataset", required=True, help="Mathematical text: hub name or file.")
    parser.add_argument("--output-dir", type=Path, required=True, help="Where weights.json and weights.md go.")
    parser.add_argument("--weights", type=a_weight, nargs="+", default=WEIGHTS, help="Of the thoughts.")
    parser.add_argument("--eval-bf16", action="store_true", help="Compute in bfloat16.")
    defaults = {each.name: each for each in fields(RealModelSettings)}
    for name in SIZES:
        default = defaults[name].default
        text = f"{defaults[name].metadata['help']} (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    for name in TEXT:
        parser.add_argument(f"--{name.replace('_', '-')}", default=defaults[name].default)
    options = vars(parser.parse_args(arguments))
    output, names = options["output_dir"], (*SIZES, *TEXT, "eval_bf16")
    logging.set_verbosity_error()
    try:
        settings = RealModelSettings(**{name: options[name] for name in names})
        sources = Sources(options["model"], options["dataset"], "gsm8k", settings)
        with alone_in(output):
            tables = write(sources, list(dict.fromkeys(options["weights"])), output)
    except (ValueError, OSError) as refusal:
        parser.exit(2, f"error: {refusal}\n")
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
