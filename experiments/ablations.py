"""What matters in learning to think: one setting at a time, on a rung of the ladder, else as one of its variants.

    python experiments/ablations.py [digits|steps|stories] [--preset rlp|paper] [--seeds 0 1 2] [--processes 2]
    python experiments/ablations.py --summarize [--preset rlp|paper]

Each value of each seed is a file in ``OUTPUT_DIR/PRESET/RUNG/seed-S/``; a run that was stopped goes on with what has
none. ``--summarize`` writes ``ablations.md`` from those files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from common.answers import OWN_THOUGHTS
from common.flags import job_flags, run
from common.folders import read_json
from common.jobs import THINK, Job, result_path
from common.markdown import markdown_table, with_interval
from common.seeds import over_seeds
from ladder import PRESETS as VARIANTS
from qstar.training.settings import PRESETS as OBJECTIVES
from qstar.training.settings import QuietStarArguments
from qstar.whole_file import write_whole
from tasks.every import TASKS

SEEDS = (0, 1, 2)
DEFAULT = "default"
MARKDOWN = "ablations.md"


class Change(NamedTuple):
    """A setting at another value than that of the preset, as settings of thoughts and of training."""

    factor: str
    value: str
    thoughts: dict[str, Any]
    training: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its result."""
        return f"{self.factor} {self.value}".strip().replace(",", "").replace(" ", "-")


def changes(rung: str, preset: str) -> list[Change]:
    """What is tried on a rung: the variant of the ladder as it is, and each change of it.

    A change of several settings of which the variant has one already is another change by itself.
    """
    tokens = TASKS[rung].thought_tokens
    clamped, signed = dict(signed_advantages=False), dict(signed_advantages=True)
    found = [Change("baseline", value, {}, dict(baseline=value)) for value in ("mean", "leave_one_out", "base")]
    found += [
        Change("advantages", "clamped", {}, clamped),
        Change("advantages", "signed", {}, signed),
        *(Change("reinforce temperature", f"{value:g}", {}, dict(reinforce_temperature=value)) for value in (1.0, 3.0)),
        Change("advantages", "clamped, temperature 3", {}, clamped | dict(reinforce_temperature=3.0)),
        Change("advantages", "signed, temperature 1", {}, signed | dict(reinforce_temperature=1.0)),
    ]
    weights = (0.0, 1.0, 10.0, 30.0, 100.0)
    found += [Change("policy weight", f"{value:g}", {}, dict(policy_weight=value)) for value in weights]
    found += [
        Change("mixing weight", "sigmoid", dict(sigmoid=True), {}),
        Change("mixing weight", "always 1", dict(mixing_head=False), dict(mixing_head_lr_factor=1.0)),
        Change("start and end tokens", "mean of the vocabulary", dict(start_init=None, end_init=None), {}),
    ]
    found += [Change("rationales", str(value), dict(rationales=value), {}) for value in (1, 4)]
    found += [
        Change("thought tokens", str(value), dict(thought_tokens=value), {}) for value in (tokens - 2, tokens + 3)
    ]
    found += [Change("ahead tokens", str(value), dict(ahead_tokens=value), {}) for value in (2, 4)]
    found += [Change("entropy weight", f"{value:g}", {}, dict(entropy_weight=value)) for value in (0.01, 0.1)]
    found += [Change("positions per row", str(value), {}, dict(positions_per_row=value)) for value in (12, 24)]
    usual = dict(policy_weight=QuietStarArguments.policy_weight)
    unchanged = (usual | OBJECTIVES[preset] | VARIANTS[preset]).items()
    return [Change(DEFAULT, "", {}, {}), *(each for each in found if not each.training.items() & unchanged)]


def jobs(given: argparse.Namespace) -> list[Job]:
    """A job for each change and seed; what the flags set is the same for all, but for the change."""
    make = partial(Job, task=given.rung, kind=THINK, split=given.split, problems=given.problems)
    common = VARIANTS[given.preset] | dict(given.set)
    return [
        make(seed=seed, name=change.name, thoughts=change.thoughts, training=common | change.training)
        for seed in given.seeds
        for change in changes(given.rung, given.preset)
    ]


def table(rung: str, preset: str, folder: Path, seeds: Sequence[int]) -> str:
    """What each change comes to: means over the seeds that have a result, with 95 % intervals over seeds."""
    header = ["setting", "value", "accuracy", "log-likelihood", "workings", "thought entropy", "seconds", "seeds"]
    rows = []
    for change in changes(rung, preset):
        paths = [result_path(folder, seed, change.name) for seed in seeds]
        found = [read_json(path) for path in paths if path.is_file()]
        if not found:
            continue
        own = [each["result"]["rows"][OWN_THOUGHTS] for each in found]
        right = [100 * each["right"].count("1") / len(each["right"]) for each in own]
        written = [100 * each["written"].count("1") / len(each["written"]) for each in own]
        logs = [fmean(each["log_prob"]) for each in own]
        rows.append(
            [
                change.factor,
                change.value,
                with_interval(fmean(right), over_seeds(right, 0, 100), digits=1),
                with_interval(fmean(logs), over_seeds(logs)),
                f"{fmean(written):.1f}",
                f"{fmean(each['result']['log'][-1]['thought_entropy'] for each in found):.2f}",
                f"{fmean(each['result']['training_seconds'] for each in found):.0f}",
                str(len(found)),
            ]
        )
    return markdown_table(header, rows)


def summarize(folder: Path, preset: str) -> str:
    """Write ``ablations.md`` from the results in ``folder``; its text.

    Raises:
        FileNotFoundError: there are no results.
    """
    seeds = {
        rung: sorted(int(path.name.partition("-")[2]) for path in (folder / rung).glob("seed-*")) for rung in TASKS
    }
    found = {rung: table(rung, preset, folder / rung, known) for rung, known in seeds.items() if known}
    if not found:
        raise FileNotFoundError(f"{folder} holds no results: run a rung first")
    about = (
        "Accuracy and workings in per cent, log-likelihood of the right answer and entropy of the sampled tokens in "
        "nats; means over seeds, with 95 % intervals over seeds."
    )
    text = about + "".join(f"\n\n## {rung}\n\n{each}" for rung, each in found.items()) + "\n"
    write_whole(folder / MARKDOWN, text)
    return text


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    flags = job_flags(__doc__, seeds=SEEDS, folder="runs/ablations")
    flags.add_argument("--preset", choices=list(VARIANTS), default="rlp", help="the variant that is changed")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    flags = parser()
    given = flags.parse_args(arguments)
    given.output_dir /= given.preset
    return run(flags, given, jobs, partial(summarize, preset=given.preset))


if __name__ == "__main__":
    sys.exit(main())
