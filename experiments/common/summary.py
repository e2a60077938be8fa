"""What the results of a ladder come to: tables of every row, of rows beside the controls, and of longer thoughts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common.answers import (
    ELSEWHERE,
    FIRST,
    NO_THOUGHTS,
    OWN_THOUGHTS,
    RANDOM,
    SAME,
    UNTRAINED,
    UNTRAINED_SAMPLED,
)
from common.folders import made_with, read_json, write_json
from common.jobs import THINK
from common.markdown import markdown_table, with_interval
from common.seeds import over_seeds
from qstar.evaluation.intervals import Interval, paired, wilson
from qstar.whole_file import write_whole

TRAINED_ALONE = (
    "base",
    "plain",
    "plain-equal-operations",
    "pause",
    "no-reward",
)  # controls that are models of their own
CONTROLS = (NO_THOUGHTS, UNTRAINED, UNTRAINED_SAMPLED, ELSEWHERE, RANDOM, SAME)  # that a model reads itself
MARKDOWN, NUMBERS = "ladder.md", "ladder.json"


@dataclass(frozen=True)
class Row:
    """Answers of a variant with one kind of thoughts, by seed.

    Attributes:
        variant: how the model was trained.
        reads: what it read.
        tokens: K of the thoughts that it read; 0 without.
        thinks: whether it was taught to think.
        answers: of each seed: ``right`` as a text of 1 and 0, ``log_prob`` of each problem, and, where there were
            thoughts, ``written``: whether each was the working.
        steps: of each problem, by seed.
    """

    variant: str
    reads: str
    tokens: int
    thinks: bool
    answers: dict[int, dict[str, Any]]
    steps: dict[int, list[int]]

    def accuracy(self, seed: int, steps: int | None = None) -> float:
        """The share of right answers, of problems of so many steps where that is given; NaN where there are none."""
        asked = zip(self.answers[seed]["right"], self.steps[seed], strict=True)
        found = [right == "1" for right, needed in asked if steps in (None, needed)]
        return fmean(found) if found else math.nan

    def log_likelihood(self, seed: int) -> float:
        """The mean log-probability of the right answer, nats."""
        return fmean(self.answers[seed]["log_prob"])

    def written(self, seed: int) -> float:
        """The share of thoughts that were the working; NaN without thoughts."""
        said = self.answers[seed].get("written")
        return said.count("1") / len(said) if said else math.nan

    def interval(self, seed: int) -> Interval:
        """Of the accuracy of a seed, over problems."""
        right = self.answers[seed]["right"]
        return wilson(right.count("1"), len(right))


def read_rows(folder: Path) -> list[Row]:
    """All rows of a rung's folder, in the order of their files' names."""
    answers: dict[tuple[str, str], dict[int, dict[str, Any]]] = defaultdict(dict)
    steps: dict[int, list[int]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("seed-*/*.json")):
        found = read_json(path)
        name, seed = found["settings"]["name"], found["settings"]["seed"]
        settings[name], steps[seed] = found["settings"], found["result"]["problem_steps"]
        for reads, row in found["result"]["rows"].items():
            answers[name, reads][seed] = row
    return [
        Row(name, reads, next(iter(rows.values())).get("tokens", 0), settings[name]["kind"] == THINK, rows, steps)
        for (name, reads), rows in answers.items()
    ]


def read_rungs(folder: Path) -> dict[str, list[Row]]:
    """The rows of every rung.

    Raises:
        FileNotFoundError: there are no results.
    """
    names = dict.fromkeys(path.parent.name for path in sorted(folder.glob("*/seed-*")))
    found = {name: rows for name in names if (rows := read_rows(folder / name))}
    if not found:
        raise FileNotFoundError(f"{folder} holds no results: run a rung first")
    return found


def write_tables(folder: Path) -> str:
    """Write ``ladder.md`` and ``ladder.json`` from the results in ``folder``; the first as a text.

    Raises:
        FileNotFoundError: there are no results.
    """
    rungs = read_rungs(folder)
    text = "\n\n".join(f"## {name}\n\n{rung_tables(rows)}" for name, rows in rungs.items()) + "\n"
    write_whole(folder / MARKDOWN, text)
    numbers = {name: [_numbers(row) for row in rows] for name, rows in rungs.items()}
    write_json(folder / NUMBERS, made_with() | dict(rungs=numbers))
    return text


def rung_tables(rows: Sequence[Row]) -> str:
    """All tables of a rung."""
    lengths = [longer_thoughts(found) for found in by_length(rows).values()]
    return "\n\n".join([every_row(rows), *beside_controls(rows), *lengths])


def every_row(rows: Sequence[Row]) -> str:
    """The mean over seeds of every row, and each seed."""
    seeds = sorted({seed for row in rows for seed in row.answers})
    header = ["trained as", "reads", "accuracy", "log-likelihood", "workings", *(f"seed {seed}" for seed in seeds)]
    lines = []
    for row in rows:
        found = sorted(row.answers)
        written = fmean(map(row.written, found))
        lines.append(
            [
                row.variant,
                row.reads,
                _share([row.accuracy(seed) for seed in found]),
                _with_interval([row.log_likelihood(seed) for seed in found], 3),
                "" if math.isnan(written) else f"{100 * written:.1f}",
                *(_seed_cell(row, seed) for seed in seeds),
            ]
        )
    return (
        "Accuracy in per cent and log-likelihood of the right answer in nats, means over seeds with 95 % intervals "
        "over seeds; of each seed the accuracy with its 95 % interval over problems. Workings: thoughts that were the "
        f"working, per cent.\n\n{markdown_table(header, lines)}"
    )


def beside_controls(rows: Sequence[Row]) -> Iterator[str]:
    """For every variant that learned what to think a table of its thoughts beside every control."""
    for own in rows:
        if own.reads != OWN_THOUGHTS or not own.thinks or own.variant in TRAINED_ALONE:
            continue
        lines = []
        for other in rows:
            same = other.variant == own.variant and other.reads in CONTROLS
            apart = other.variant in TRAINED_ALONE and other.reads in (NO_THOUGHTS, OWN_THOUGHTS)
            if same or apart:
                lines.append(_beside(own, other))
        header = ["beside", "reading", "accuracy", "seeds above", "log-likelihood", "seeds above"]
        yield (
            f"What the thoughts of {own.variant} gain, means over seeds with 95 % intervals over seeds; seeds above "
            "are those in which the 95 % interval of the difference, over problems and paired, is above 0.\n\n"
            f"{markdown_table(header, lines)}"
        )


def by_length(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows that read own thoughts, by variant, from the shortest to the whole; of variants where some are cut."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        learned = row.thinks and row.variant not in TRAINED_ALONE
        if learned and row.reads in (OWN_THOUGHTS, FIRST.format(row.tokens)):
            found[row.variant].append(row)
    return {name: sorted(own, key=lambda row: row.tokens) for name, own in found.items() if len(own) > 1}


def longer_thoughts(lengths: Sequence[Row]) -> str:
    """Accuracy by the number of steps, for every K."""
    needed = steps_of(lengths)
    lines = []
    for row in lengths:
        cells = [[row.accuracy(seed, steps) for seed in sorted(row.answers)] for steps in (None, *needed)]
        lines.append([str(row.tokens), _share(cells[0]), *(f"{100 * fmean(each):.1f}" for each in cells[1:])])
    return (
        f"Accuracy of {lengths[0].variant} in per cent by K, the tokens of its thoughts that it reads, and by the "
        "steps that a problem takes; means over seeds, all problems with 95 % intervals over seeds.\n\n"
        f"{markdown_table(['K', 'all', *map(str, needed)], lines)}"
    )


def steps_of(rows: Sequence[Row]) -> list[int]:
    """All numbers of steps that problems take."""
    return sorted({steps for row in rows for each in row.steps.values() for steps in each})


def _beside(own: Row, other: Row) -> list[str]:
    seeds = sorted(own.answers.keys() & other.answers.keys())
    cells = [other.variant, other.reads]
    for name, scale, digits in (("right", 100, 1), ("log_prob", 1, 3)):
        pairs = [(list(map(float, own.answers[s][name])), list(map(float, other.answers[s][name]))) for s in seeds]
        gains = [scale * (fmean(ours) - fmean(theirs)) for ours, theirs in pairs]
        above = sum(paired(ours, theirs).low > 0 for ours, theirs in pairs)
        cells += [_with_interval(gains, digits, sign="+"), f"{above} of {len(seeds)}"]
    return cells


def _seed_cell(row: Row, seed: int) -> str:
    if seed not in row.answers:
        return ""
    low, high = row.interval(seed)
    return f"{100 * row.accuracy(seed):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _share(values: Sequence[float]) -> str:
    """A mean share in per cent, with its interval."""
    found = [100 * value for value in values]
    return with_interval(fmean(found), over_seeds(found, 0, 100), digits=1)


def _with_interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    return with_interval(fmean(values), over_seeds(values), sign=sign, digits=digits)


def _numbers(row: Row) -> dict[str, Any]:
    """A row as JSON: small enough to be kept beside what is said of it."""
    return dict(
        variant=row.variant,
        reads=row.reads,
        thought_tokens=row.tokens,
        seeds={
            seed: dict(
                asked=len(row.answers[seed]["right"]),
                right=row.answers[seed]["right"].count("1"),
                log_likelihood=round(row.log_likelihood(seed), 4),
                workings=row.written(seed),
            )
            for seed in sorted(row.answers)
        },
    )
