"""The ladder of built-in tasks: does a decoder learn to think, and do its thoughts beat all that could replace them?

    python experiments/ladder.py digits|steps|stories [--seeds 0 1 2 3 4] [--processes 2] [--output-dir runs/ladder]
    python experiments/ladder.py --summarize [--output-dir runs/ladder]

Each variant of each seed is a file in ``OUTPUT_DIR/RUNG/seed-S/``; a run that was stopped goes on with what has none.
``--summarize`` writes ``ladder.md``, ``ladder.json`` and, where matplotlib is there, ``RUNG.png`` from those files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.flags import job_flags, run
from common.jobs import BASE, OPERATIONS, PAUSE, PLAIN, THINK, Job
from common.plots import draw_rung
from common.summary import read_rungs, write_tables
from qstar.training.curves import can_draw

SEEDS = (0, 1, 2, 3, 4)
ONLY_IF_NAMED = {"stories": ("no-reward",)}  # by rung: a seed there takes ten times as long as on digits
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(preset="paper", policy_weight=30.0),
    "rlp": dict(preset="rlp"),
}


def variants() -> dict[str, dict[str, Any]]:
    """What is trained on every rung, as arguments of :class:`common.jobs.Job`, by name."""
    return {
        "base": dict(kind=BASE),
        "plain": dict(kind=PLAIN),
        "plain-equal-operations": dict(kind=OPERATIONS),
        "pause": dict(kind=PAUSE),
        "no-reward": dict(kind=THINK, training=dict(policy_weight=0.0)),
        **{name: dict(kind=THINK, training=training) for name, training in PRESETS.items()},
    }


def jobs(given: argparse.Namespace) -> list[Job]:
    """The jobs that the flags ask for.

    Raises:
        ValueError: there is no such variant.
    """
    known = variants()
    for name in given.variants or ():
        if name not in known:
            raise ValueError(f"variant is {name!r}, but it must be one of {', '.join(known)}")
    chosen = given.variants or [name for name in known if name not in ONLY_IF_NAMED.get(given.rung, ())]
    make = partial(Job, task=given.rung, split=given.split, problems=given.problems)
    return [
        make(seed=seed, name=name, **known[name] | dict(training=known[name].get("training", {}) | dict(given.set)))
        for seed in given.seeds
        for name in chosen
    ]


def summarize(folder: Path) -> str:
    """Write the tables and, where matplotlib is there, a plot of each rung; the tables as a text."""
    text = write_tables(folder)
    if can_draw():
        for name, rows in read_rungs(folder).items():
            draw_rung(name, rows, folder / f"{name}.png")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    flags = job_flags(__doc__, seeds=SEEDS, folder="runs/ladder")
    flags.add_argument("--variants", nargs="+", metavar="NAME", help="all by default; on stories all but no-reward")
    return run(flags, flags.parse_args(arguments), jobs, summarize)


if __name__ == "__main__":
    sys.exit(main())
