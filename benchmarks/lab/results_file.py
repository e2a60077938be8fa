"""What a benchmark command does: check and time the contenders of every case in turn, and write what it finds.

A contender that cannot run is absent, with the reason; a case that cannot run, or is left out for time, is listed.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lab.device_limits import Limits, describe, device_name, measure_limits, slug, versions
from lab.paired import Call, Time, TurnFailed, clock_of, median_ratio, rehearse, take_turns

RESULTS = Path(__file__).parents[1] / "results"
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = {"fewest": 3, "most": 20, "seconds": 2.0}


class Unsupported(Exception):
    """This way is not for this device or size."""


def need_gpu(x: Tensor) -> None:
    if x.device.type != "cuda":
        raise Unsupported("needs a GPU")


class Peer(NamedTuple):
    """A way to compute it: ``prepare`` takes a pass's inputs and gives what is timed, or raises where it cannot."""

    name: str
    prepare: Callable[..., Callable[..., Any]]
    note: str = ""


class Contender(NamedTuple):
    """One that runs and is right; ``peak_bytes`` beyond its inputs, ``error`` the largest relative one."""

    call: Call
    peak_bytes: int
    error: float
    note: str


class Job(NamedTuple):
    """A pass at one size: ``measure`` gives its record, in which ``pass`` and ``contenders`` are."""

    label: str
    measure: Callable[[Limits], dict]
    headline: Callable[[dict], str]


class DeviceLost(RuntimeError):
    """A contender left the GPU in a state in which nothing runs any more."""


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def limits_of(device: torch.device) -> Limits:
    return measure_limits(device, DTYPE[device.type])


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0][:300] if lines else "no message"
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"


def free_memory(device: torch.device, after: str) -> None:
    """Give unused memory back to the device; raises if the GPU did not survive what ran last."""
    gc.collect()
    if device.type != "cpu":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(f"after {after}: {reason(error)}") from error
        torch.cuda.empty_cache()


def rehearse_all(
    peers: list[Peer],
    prepare: Callable[[Peer], Call],
    check: Callable[[Peer, Any], float],
    device: torch.device,
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run and are right, and why the others are absent.

    Of peers with the same name only the first that can run is taken. ``check`` takes the results of a call, and raises
    where they are wrong.
    """
    ready, absent = {}, {}
    for peer in peers:
        if peer.name in ready:
            continue
        try:
            call = prepare(peer)
            results, peak = rehearse(call, device)
            error = check(peer, results)
        except Exception as failure:
            why = f"{peer.note}: {reason(failure)}" if peer.note else reason(failure)
            absent[peer.name] = f"{absent[peer.name]}; {why}" if peer.name in absent else why
        else:
            ready[peer.name] = Contender(call, peak, error, peer.note)
        call = results = None
        if peer.name not in ready:
            free_memory(device, after=peer.name)
    return ready, {name: why for name, why in absent.items() if name not in ready}


def time_all(ready: dict[str, Contender], absent: dict[str, str], device: torch.device) -> dict[str, list[Time]]:
    """Times of those that are ready; one that fails now joins the absent, and the others start again."""
    while "ours" in ready:
        calls = {name: each.call for name, each in ready.items()}
        try:
            return take_turns(calls, clock_of(device), **ROUNDS)
        except TurnFailed as failure:
            absent[failure.name] = reason(failure.__cause__)
            del ready[failure.name]
            failed = failure.name
        del calls
        free_memory(device, after=failed)
    raise RuntimeError(f"ours did not run: {absent['ours']}")


def figures(
    ready: dict[str, Contender], times: dict[str, list[Time]], flops: float, bound_ms: float, device: torch.device
) -> dict[str, dict]:
    """What the JSON holds of each contender that was timed; ``flops`` are the useful ones, if they count."""
    records = {}
    for name, own in times.items():
        seconds = statistics.median(each.seconds for each in own)
        records[name] = {
            "ms": 1e3 * seconds,
            "times_ours": median_ratio(own, times["ours"]),
            **({"useful_tflop_per_s": flops / seconds / 1e12} if flops else {}),
            "fraction_of_bound": bound_ms / (1e3 * seconds),
            "peak_mib": ready[name].peak_bytes / 2**20,
            "error": ready[name].error,
            "rounds": len(own),
        }
        if device.type != "cpu":
            records[name]["host_ms"] = 1e3 * statistics.median(each.host for each in own)
        if "products" in times:
            records[name]["times_products"] = median_ratio(own, times["products"])
        if ready[name].note:
            records[name]["note"] = ready[name].note
    return records


def measure_peers(
    peers: list[Peer],
    prepare: Callable[[Peer], Call],
    check: Callable[[Peer, Any], float],
    flops: float,
    bound_ms: float,
    device: torch.device,
) -> tuple[dict[str, dict], dict[str, str]]:
    """What the JSON holds of the contenders that run and are right, and why the others are absent."""
    ready, absent = rehearse_all(peers, prepare, check, device)
    times = time_all(ready, absent, device)
    return figures(ready, times, flops, bound_ms, device), absent


def report(benchmark, record: dict, fields: tuple[str, ...], call: Call, device: torch.device) -> None:
    """To pytest-benchmark: these fields of a record, its contenders as flat fields, and times of ``call``."""
    record = rounded(record)
    info = benchmark.extra_info
    info.update(
        {f"{field}_{name}": value for name, own in record["contenders"].items() for field, value in own.items()}
    )
    info.update({f"absent_{name}": why for name, why in record["absent"].items()})
    info.update({field: record[field] for field in fields})

    def finished():
        call()
        if device.type != "cpu":
            torch.cuda.synchronize(device)

    benchmark.pedantic(finished, rounds=2)


def table(record: dict) -> Iterator[str]:
    for name, own in record["contenders"].items():
        cells = (
            f"  {name:<18} {own['ms']:>10.3f} ms",
            f"{own['useful_tflop_per_s']:>9.3g} TFLOP/s" if "useful_tflop_per_s" in own else " " * 17,
            f"{own['fraction_of_bound']:>6.1%} of the bound {own['times_ours']:>7.2f} x ours",
            f"{own['times_products']:>6.2f} x products" if "times_products" in own else "",
            f"{own['peak_mib']:>9.1f} MiB",
        )
        yield " ".join(cell for cell in cells if cell)
    for why in dict.fromkeys(record["absent"].values()):
        names = ", ".join(name for name, given in record["absent"].items() if given == why)
        yield f"  absent: {names} ({why})"


def rounded(tree: dict) -> dict:
    """With five significant digits: what is measured has no more."""
    return json.loads(json.dumps(tree), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def write(path: Path, results: dict) -> None:
    """Whole or not at all, since a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rounded(results), indent=1) + "\n")
    part.replace(path)


def run(benchmark: str, device: torch.device, jobs: Iterable[Job], folder: Path, seconds: float) -> None:
    began = time.monotonic()
    path = folder / f"{benchmark}-{slug(device_name(device))}.json"
    dtype = DTYPE[device.type]
    limits = measure_limits(device, dtype)
    results = {
        "benchmark": benchmark,
        "device": describe(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "limits": {
            "dtype": str(dtype).removeprefix("torch."),
            "matrix_tflop_per_s": limits.matrix_flops / 1e12,
            "copy_gb_per_s": limits.bandwidth / 1e9,
        },
        "cases": [],
        "not_run": [],
    }
    print("{name}, torch {torch}:".format(**results["device"], **results["versions"]), end=" ")
    print(
        "{matrix_tflop_per_s:.3g} TFLOP/s in {dtype}, {copy_gb_per_s:.4g} GB/s".format(**results["limits"]), flush=True
    )
    for job in jobs:
        if time.monotonic() - began > seconds:
            results["not_run"].append({"case": job.label, "why": "the time was up"})
            continue
        try:
            record = job.measure(limits)
        except Exception as failure:
            results["not_run"].append({"case": job.label, "why": reason(failure)})
            print(f"{job.label}: not run: {reason(failure)}", flush=True)
        else:
            results["cases"].append(record)
            print(job.headline(record), *table(record), sep="\n", flush=True)
        write(path, results)
        free_memory(device, after=job.label)
    write(path, results)
    print(f"{len(results['cases'])} cases in {path}, {len(results['not_run'])} not run")


def parse_options(description: str, quick: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help=quick)
    seconds = ("--seconds", "--limit-seconds")
    parser.add_argument(*seconds, type=float, default=math.inf, help="start no case after this time (no limit)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (%(default)s)")
    return parser.parse_args()
