"""The summary of a folder: everything that is there whole, as JSON, as tables and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.folders import SETTINGS_FILE, in_turn, made_with, read_json, write_json
from common.markdown import markdown_table, with_interval
from qstar.evaluation.record import read_report
from qstar.evaluation.report import ACCURACY, LOG_LIKELIHOOD, TaskReport
from qstar.evaluation.run import WITHOUT
from qstar.whole_file import write_whole
from real.evaluate import read_text_scores
from real.measured import (
    UNTRAINED,
    Values,
    quarters_of_text,
    steps_of_questions,
    summed,
    sums_of_text,
    values_of_task,
)
from real.picture import draw
from real.settings import BASE, VARIANTS
from real.train import TRAINING_FILE

SUMMARY_FILE, TABLES_FILE, PICTURE_FILE = "summary.json", "summary.md", "summary.png"
SCHEMA = 1
LOGGED = {  # of the last updates, by the names in the log
    "mixing_weight": "mixing weight",
    "thought_entropy": "entropy of the thoughts' tokens",
    "distinct_thoughts": "distinct thoughts",
}
PER = {LOG_LIKELIHOOD: "log-likelihood, nats", ACCURACY: "exact accuracy"}


def summarize(output: Path, tasks: list[str]) -> str:
    """Write the summary of a folder, and return its tables; of several processes each writes what it finds.

    Args:
        output: the folder.
        tasks: names of the tasks.
    """
    folders = _folders(output)
    trained = [read_json(folder / TRAINING_FILE) for _, _, folder in folders if (folder / TRAINING_FILE).exists()]
    sections = [found for found in (_text(folders), *(_task(folders, name) for name in tasks)) if found]
    record = {
        "schema": SCHEMA,
        "settings": read_json(output / SETTINGS_FILE),
        "training": [_brief(each) for each in trained],
        "results": sections,
    }
    tables = "\n\n".join([_training_table(record["training"]), *map(_tables, sections)]) + "\n"
    with in_turn(output):
        write_json(output / SUMMARY_FILE, record | made_with())
        write_whole(output / TABLES_FILE, tables)
        draw(sections, output / PICTURE_FILE)
    return tables


def _folders(output: Path) -> list[tuple[str, int, Path]]:
    """Variant, seed and folder of everything that was begun, the base first."""
    found = [(BASE, UNTRAINED, output / BASE)]
    for name in VARIANTS:
        for folder in output.glob(f"{name}-*"):
            seed = folder.name.removeprefix(f"{name}-")
            if seed.isdigit():
                found.append((name, int(seed), folder))
    return sorted(found[:1]) + sorted(found[1:], key=lambda each: ([*VARIANTS].index(each[0]), each[1]))


def _brief(record: dict[str, Any]) -> dict[str, Any]:
    """What a training was, with the first and the last line of its log in the place of all."""
    logged = [each for each in record["log"] if "loss" in each]
    first, last = (logged[0], logged[-1]) if logged else ({}, {})
    return record | {"first_log": first, "log": last}


def _text(folders: list[tuple[str, int, Path]]) -> dict[str, Any] | None:
    """The held-out text, by how hard the base finds a token; None where the base is not there yet."""
    base = read_text_scores(folders[0][2])
    if base is None:
        return None
    rows = base["row"].numpy()
    groups, quarter = quarters_of_text(rows, base[WITHOUT].double().numpy())
    values: Values = {}
    for variant, seed, folder in folders:
        for way, scores in (read_text_scores(folder) or {}).items():
            if way != "row":
                sums = sums_of_text(scores.double().numpy(), rows, quarter)
                values.setdefault((variant, way), {})[seed] = sums
    return {
        "name": "held-out text",
        "unit": "token",
        "units": len(rows),
        "groups": groups.names,
        "counts": groups.counts.sum(0).tolist(),
        "metrics": {LOG_LIKELIHOOD: summed(values, groups)},
    }


def _task(folders: list[tuple[str, int, Path]], name: str) -> dict[str, Any] | None:
    """A task, by the steps of its reference solutions; None where the base has not answered yet."""
    reports: list[tuple[str, int, TaskReport]] = []
    for variant, seed, folder in folders:
        path = folder / f"{name}.json"
        if path.exists():
            reports.append((variant, seed, read_report(path)[0]))
    if not reports or reports[0][0] != BASE:
        return None
    groups = steps_of_questions(reports[0][2])
    found = values_of_task(reports, groups)
    return {
        "name": name,
        "unit": "answer",
        "units": len(groups.counts),
        "groups": groups.names,
        "counts": groups.counts.sum(0).tolist(),
        "fingerprint": reports[0][2].questions.fingerprint,
        "metrics": {metric: summed(values, groups) for metric, values in found.items()},
    }


def _training_table(trained: list[dict[str, Any]]) -> str:
    header = ["variant", "seed", "steps", "text tokens", "10^15 multiply-adds", "seconds", *LOGGED.values(), "on"]
    rows = [
        [
            each["variant"],
            str(each["seed"]),
            str(each["steps"]),
            f"{each['tokens']:,}",
            f"{each['multiply_adds'] / 1e15:.3g}",
            f"{each['seconds']:.0f}",
            *(f"{each['log'][name]:.3f}" if each["thoughts"] and name in each["log"] else "" for name in LOGGED),
            each["device"],
        ]
        for each in trained
    ]
    return f"# Training\n\n{markdown_table(header, rows)}"


def _tables(section: dict[str, Any]) -> str:
    """The tables of a text or task: each metric over all, then the log-likelihood by difficulty."""
    parts = [f"# {section['name']}, {section['units']:,} {section['unit']}s, 95 % intervals"]
    for metric, entries in section["metrics"].items():
        references = list(dict.fromkeys(name for each in entries for name in each["against"]))
        header = ["trained", "predicts", PER[metric], "each seed", *(f"less {name}" for name in references)]
        rows = [
            [
                each["variant"],
                each["way"],
                with_interval(each["mean"][0], each["interval"][0]),
                ", ".join(f"{means[0]:.3f}" for means in each["by_seed"]) if each["seeds"] else "",
                *(_against(each, name, 0) for name in references),
            ]
            for each in entries
        ]
        parts.append(markdown_table(header, rows))
        if metric != LOG_LIKELIHOOD or len(section["groups"]) == 1:
            continue
        for reference in references:
            header = ["trained", "predicts", *section["groups"][1:]]
            rows = [
                [
                    each["variant"],
                    each["way"],
                    *(_against(each, reference, n) for n in range(1, len(section["groups"]))),
                ]
                for each in entries
                if reference in each["against"]
            ]
            counts = ", ".join(f"{count:.0f}" for count in section["counts"][1:])
            parts.append(f"{PER[metric]}, less {reference}, by difficulty ({counts} {section['unit']}s):")
            parts.append(markdown_table(header, rows))
    return "\n\n".join(parts)


def _against(entry: dict[str, Any], reference: str, group: int) -> str:
    found = entry["against"].get(reference)
    if found is None or not np.isfinite(found["mean"][group]):
        return ""
    return with_interval(found["mean"][group], found["interval"][group], sign="+")
