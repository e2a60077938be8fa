"""How much a model's thoughts help before it is trained, whatever weight a mixing head would give them.

    python experiments/constant_weights.py --model M --dataset TEXT --output-dir D [--weights 0.02 0.05 0.1 0.2 0.5 1]

The base of the experiment with a real model thinks about the held-out text, greedily, and each thought is mixed in with
one and the same weight. Where no weight gains anything, a mixing head learns to close. ``weights.json`` and
``weights.md`` hold the log-likelihood less that without thoughts, over all tokens and by how hard the base finds them.
The flags are those of ``real_model.py`` that say what is read and how long a thought is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from transformers.utils import logging

from common.folders import made_with, write_json
from common.markdown import markdown_table, with_interval
from qstar.evaluation.text_scores import TextScores, score_text
from qstar.heads import MixingHead
from qstar.training.folders import alone_in
from qstar.whole_file import write_whole
from real.evaluate import precision
from real.measured import Difference, mean_of, quarters_of_text, sums_of_text
from real.settings import VARIANTS, RealModelSettings
from real.sources import Sources

WEIGHTS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SIZES = ("seq_length", "thought_tokens", "held_out", "held_out_rows", "text_batch_size", "max_grid_tokens")


@torch.no_grad()
def hold_weight(head: MixingHead, weight: float) -> None:
    """Let the head answer ``weight`` to whatever it reads."""
    head.hidden.weight.zero_()
    head.hidden.bias.fill_(1.0)
    head.output.weight.fill_(weight / head.output.weight.numel())


def scores_by_weight(sources: Sources, weights: Sequence[float]) -> tuple[TextScores, dict[float, TextScores]]:
    """Those of the held-out text without a weight, and with each of the weights, from the same thoughts."""
    model = sources.untrained(VARIANTS["rlp"])
    limit = sources.settings.max_grid_tokens or None
    head = model.qstar_mixing_head
    assert isinstance(head, MixingHead)
    with precision(sources):
        before = score_text(model, sources.held_out_batches, max_grid_tokens=limit)
        found = {}
        for weight in weights:
            hold_weight(head, weight)
            found[weight] = score_text(model, sources.held_out_batches, thoughts=before.thoughts, max_grid_tokens=limit)
    return before, found


def gains(before: TextScores, found: dict[float, TextScores]) -> tuple[tuple[str, ...], dict[float, Difference]]:
    """What each weight adds to the log-likelihood of a token, over all and by difficulty, and the names of these."""
    rows, base = before.row.numpy(), before.without.double().numpy()
    groups, quarter = quarters_of_text(rows, base)
    differences = {}
    for weight, scores in found.items():
        assert scores.after is not None
        sums = sums_of_text(scores.after.double().numpy() - base, rows, quarter)
        differences[weight] = mean_of(sums, groups.counts)
    return groups.names, differences


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="Hub name or folder of the base.")
    parser.add_argument("--dataset", required=True, help="Mathematical text: hub name or file.")
    parser.add_argument("--output-dir", type=Path, required=True, help="Where weights.json and weights.md go.")
    parser.add_argument("--weights", type=float, nargs="+", default=WEIGHTS, help="Of the thoughts.")
    parser.add_argument("--eval-bf16", action="store_true", help="Compute in bfloat16.")
    defaults = {each.name: each for each in fields(RealModelSettings)}
    for name in SIZES:
        default = defaults[name].default
        text = f"{defaults[name].metadata['help']} (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    options = vars(parser.parse_args(arguments))
    settings = RealModelSettings(**{name: options[name] for name in (*SIZES, "eval_bf16")})
    output, named = options["output_dir"], {name: options[name] for name in ("model", "dataset", *SIZES, "eval_bf16")}
    logging.set_verbosity_error()
    sources = Sources(options["model"], options["dataset"], "gsm8k", settings)
    with alone_in(output):
        before, found = scores_by_weight(sources, options["weights"])
        names, differences = gains(before, found)
        record = {
            "settings": named,
            "tokens": len(before.row),
            "groups": names,
            "weights": {str(weight): each.as_json() for weight, each in differences.items()},
        }
        write_json(output / "weights.json", record | made_with())
        rows = [
            [f"{weight:g}", *(with_interval(mean, each, sign="+") for mean, each in zip(*found, strict=True))]
            for weight, found in differences.items()
        ]
        tables = markdown_table(["weight", *names], rows) + "\n"
        write_whole(output / "weights.md", tables)
    print(tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
