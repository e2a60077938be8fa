"""The stages of on_this_gpu.py: what each runs, what it takes, and what is read from what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
MOST_WORKERS = 12  # processes that share the tests, since compiling takes most of their time
SETTLING = 30  # seconds before a stage is killed from which a benchmark starts nothing new
TESTS = (
    "gpu/test_on_a_gpu.py",
    "gpu/test_generation.py",
    "kernels/thought_attention/test_gluon_attention.py",
    "kernels/thought_attention/test_triton_attention.py",
    "kernels/lm_head/test_triton_lm_head.py",
    "kernels/lm_head/test_lm_head_product_dtype.py",
    "benchmarks/peers/test_epilogue_sampling.py",
    "benchmarks/lab/test_ranges.py",
    "kernels/tools/test_tune.py",
)  # those that take a GPU where there is one
KERNELS, DTYPES = ("attention", "rules", "head"), ("bfloat16", "float32")
PARTS = (*map("-".join, product(KERNELS, DTYPES)), "hopper-bfloat16")  # of lab/every_kernel.py
SANITIZER = "compute-sanitizer"
SANITIZER_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


class Unavailable(Exception):
    """A stage cannot run here."""


class Room(NamedTuple):
    """Where a stage works: ``out`` is kept, ``scratch`` is not; ``seconds`` until it is killed."""

    out: Path
    scratch: Path
    seconds: float

    @property
    def limit(self) -> str:
        """Of a benchmark, from which on it starts nothing new."""
        return f"{max(self.seconds - SETTLING, self.seconds / 2):.0f}"


Command = Sequence[str | Path]


class Stage(NamedTuple):
    """What is run at once, and what is found.

    Attributes:
        what: it does, in a line.
        seconds: what it takes to tell something. It is not started with less, and its share of the time is as large.
        commands: all run side by side; raises :class:`Unavailable` with the reason.
        read: what they found, also after a failure; gets their logs.
    """

    what: str
    seconds: float
    commands: Callable[[Room], list[Command]]
    read: Callable[[Room, list[str]], dict[str, Any]]


def python(*arguments: str | Path) -> Command:
    return (sys.executable, *arguments)


def check_commands(room: Room) -> list[Command]:
    files = [ROOT / "tests" / name for name in TESTS]
    workers = max(1, min(MOST_WORKERS, 3 * (os.cpu_count() or 1) // 4))
    shared = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "lab.gpu_record", *files)
    return [
        python(*shared, "--record", room.scratch / f"tests-{worker}.json", "--share", f"{worker}/{workers}")
        for worker in range(workers)
    ]


def read_checks(room: Room, _: list[str]) -> dict[str, Any]:
    """Sums over the processes; what is missing of ``chosen`` did not run."""
    records = [json.loads(path.read_text()) for path in sorted(room.scratch.glob("tests-*.json"))]
    total = {name: sum(each[name] for each in records) for name in ("chosen", "passed", "failed", "skipped", "on_gpu")}
    failures = {name: why for each in records for name, why in each["failures"].items()}
    return total | {"failures": failures}


def read_results(out: Path) -> dict[str, dict]:
    """The benchmarks' results in a folder, by the name of the benchmark; the newest of each."""
    found = {}
    for path in sorted(out.glob("*.json"), key=lambda path: path.stat().st_mtime):
        with contextlib.suppress(json.JSONDecodeError):  # a table of tiles that was cut short
            results = json.loads(path.read_text())
            if "benchmark" in results:
                found[results["benchmark"]] = results
    return found


def bench(script: str) -> Callable[[Room], list[Command]]:
    return lambda room: [python(BENCHMARKS / script, "--out", room.out, "--seconds", room.limit)]


def read_cases(benchmark: str) -> Callable[[Room, list[str]], dict[str, Any]]:
    def read(room: Room, _: list[str]) -> dict[str, Any]:
        results = read_results(room.out).get(benchmark, {"cases": [], "not_run": []})
        why = {each["case"]: each["why"] for each in results["not_run"]}
        return {"cases": len(results["cases"]), "not_run": why}

    return read


def train_commands(room: Room) -> list[Command]:
    return [python("-m", "qstar", "train", "--output-dir", room.scratch / "embedded")]


def read_training(room: Room, _: list[str]) -> dict[str, Any]:
    path = room.scratch / "embedded" / "report.json"
    return json.loads(path.read_text()) if path.exists() else {}


def sanitizer() -> str:
    places = [os.environ.get("PATH", os.defpath), *SANITIZER_PLACES]
    found = shutil.which(SANITIZER, path=os.pathsep.join(places))
    if found is None:
        raise Unavailable(f"{SANITIZER} is not installed (it comes with the CUDA toolkit)")
    return found


def sanitizer_commands(room: Room) -> list[Command]:
    watch = (sanitizer(), "--error-exitcode", "9", "--tool")
    watched = [python("-m", "lab.every_kernel", part) for part in PARTS]
    return [(*watch, tool, *command) for tool in ("memcheck", "racecheck") for command in watched]


def read_sanitizer(_: Room, logs: list[str]) -> dict[str, Any]:
    """The tools' own last lines."""
    lines = [line for log in logs for line in log.splitlines()]
    return {"summaries": [line.strip("= ") for line in lines if "SUMMARY" in line or "launches" in line]}


def tune_commands(op: str, *options: str) -> Callable[[Room], list[Command]]:
    command = ("-m", "qstar_kernels.tools.tune", "--op", op, "--dtypes", "bfloat16", *options)
    return lambda room: [python(*command, "--write", room.out / f"tiles-{op}.json")]


def read_tuning(_: Room, logs: list[str]) -> dict[str, Any]:
    """Of each kernel the table's tile and the chosen one, with their times."""
    chosen, kernel = {}, None
    for line in "\n".join(logs).splitlines():
        if match := re.match(r"(\w+, \w+, width \d+): \d+ of", line):
            kernel = match[1]
            chosen[kernel] = {}
        elif kernel and (match := re.match(r" *([\d.]+) ms  (\S+ \S+ \S+)(.*)", line)):
            for note in ("the table's", "chosen"):
                if f"({note})" in match[3]:
                    chosen[kernel][note] = f"{match[2]}: {match[1]} ms"
    return {"kernels": chosen}


STAGES: dict[str, Stage] = {  # the most telling first
    "tests": Stage(
        "the tests that take a GPU, shared by several processes; counts those that ran on it",
        100,
        check_commands,
        read_checks,
    ),
    "attention": Stage(
        "bench_thought_attention.py: thought attention beside its peers",
        150,
        bench("bench_thought_attention.py"),
        read_cases("thought_attention"),
    ),
    "head": Stage(
        "bench_lm_head.py: the head beside its peers and its bare products",
        110,
        bench("bench_lm_head.py"),
        read_cases("lm_head"),
    ),
    "step": Stage(
        "bench_llama_step.py: training steps of Llamas, by phase, beside the masked path",
        110,
        bench("bench_llama_step.py"),
        read_cases("llama_step"),
    ),
    "train": Stage(
        "qstar train, the embedded default, beside the spread of seeds on a CPU",
        150,
        train_commands,
        read_training,
    ),
    "sanitizer": Stage(
        "every kernel under compute-sanitizer's memcheck and racecheck, where it is installed",
        60,
        sanitizer_commands,
        read_sanitizer,
    ),
    "tune_attention": Stage(
        "qstar_kernels' tuning of attention in bfloat16; writes the table of tiles that it proposes",
        200,
        tune_commands("thought_attention", "--widths", "128", "64"),
        read_tuning,
    ),
    "tune_head": Stage(
        "the same for the head",
        120,
        tune_commands("lm_head"),
        read_tuning,
    ),
}
