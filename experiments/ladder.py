"""The ladder of built-in tasks: does a decoder learn to think, and do its thoughts beat all that could replace them?

    python experiments/ladder.py digits|steps|stories [--seeds 0 1 2 3 4] [--processes 2] [--output-dir runs/ladder]
    python experiments/ladder.py --summarize [--output-dir runs/ladder]

Each variant of each seed is a file in ``OUTPUT_DIR/RUNG/seed-S/``; a run that was stopped goes on with what has none.
``--summarize`` writes ``ladder.md``, ``ladder.json`` and, where matplotlib is there, ``RUNG.png`` from those files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common.jobs import BASE, OPERATIONS, PAUSE, PLAIN, THINK, Job, run_jobs
from common.plots import draw_rung
from common.results import TimeLimit
from common.summary import read_rungs, write_tables
from qstar.training.curves import can_draw
from qstar.training.folders import alone_in
from tasks.every import TASKS

SEEDS = (0, 1, 2, 3, 4)
PROBLEMS = 500
CUT = (1, 2, 4, 6)  # tokens of a thought, where more steps need longer ones
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(policy_weight=30.0),
    "rlp": dict(policy_weight=10.0, baseline="leave_one_out", signed_advantages=True, reinforce_temperature=1.0),
}


def variants(rung: str) -> dict[str, dict[str, Any]]:
    """What is trained on a rung, as arguments of :class:`common.jobs.Job`, by name."""
    found: dict[str, dict[str, Any]] = {
        "base": dict(kind=BASE),
        "plain": dict(kind=PLAIN),
        "plain-equal-operations": dict(kind=OPERATIONS),
        "pause": dict(kind=PAUSE),
        "no-reward": dict(kind=THINK, training=dict(policy_weight=0.0)),
    }
    found |= {name: dict(kind=THINK, training=training) for name, training in PRESETS.items()}
    if rung == "steps":
        for tokens in CUT:
            found[f"rlp-{tokens}"] = found["rlp"] | dict(thoughts=dict(thought_tokens=tokens))
    return found


def jobs(
    rung: str, seeds: list[int], names: list[str] | None, split: str, problems: int, settings: dict[str, Any]
) -> list[Job]:
    """The jobs of a rung.

    Args:
        rung: name of the task.
        seeds: of the jobs.
        names: of the variants; all by default.
        split: of the problems that are asked.
        problems: how many are asked.
        settings: of the training, in the place of those of the variants.

    Raises:
        ValueError: there is no such variant.
    """
    known = variants(rung)
    for name in names or ():
        if name not in known:
            raise ValueError(f"variant is {name!r}, but it must be one of {', '.join(known)}")
    return [
        Job(task=rung, seed=seed, name=name, split=split, problems=problems, **_with(known[name], settings))
        for seed in seeds
        for name in names or known
    ]


def _with(variant: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return variant | dict(training=variant.get("training", {}) | settings)


def summarize(folder: Path) -> str:
    """Write the tables and, where matplotlib is there, a plot of each rung; the tables as a text."""
    text = write_tables(folder)
    if can_draw():
        for name, rows in read_rungs(folder).items():
            draw_rung(name, rows, folder / f"{name}.png")
    return text


def setting(text: str) -> tuple[str, Any]:
    """``name=value`` with a value in JSON, or a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} must be name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("rung", nargs="?", choices=list(TASKS), help="the task")
    flags.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="S")
    flags.add_argument("--variants", nargs="+", metavar="NAME", help="all of the rung by default")
    flags.add_argument("--output-dir", type=Path, default=Path("runs/ladder"), metavar="FOLDER")
    flags.add_argument("--processes", type=int, default=1, metavar="N", help="seeds worked on at a time, one core each")
    flags.add_argument("--minutes", type=float, metavar="M", help="begin nothing after so many")
    flags.add_argument("--problems", type=int, default=PROBLEMS, metavar="N", help="that are asked")
    flags.add_argument("--split", choices=["validation", "test"], default="test", help="validation to choose settings")
    flags.add_argument("--set", type=setting, nargs="+", default=[], metavar="NAME=VALUE", help="settings of training")
    flags.add_argument("--summarize", action="store_true", help="write tables and plots of what is there")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    flags = parser()
    given = flags.parse_args(arguments)
    if given.summarize:
        print(summarize(given.output_dir))
        return 0
    if given.rung is None:
        flags.error("a rung is needed, or --summarize")
    try:
        asked = jobs(given.rung, given.seeds, given.variants, given.split, given.problems, dict(given.set))
        folder = given.output_dir / given.rung
        with alone_in(folder):
            left = run_jobs(asked, folder, TimeLimit(given.minutes), given.processes)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if left:
        print(f"{left} of {len(asked)} are left: the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
