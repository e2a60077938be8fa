"""Thought attention against every other way to compute it, and against what the device can do.

    python benchmarks/bench_thought_attention.py [--quick] [--limit-seconds S] [--out FOLDER]

prints a table while it goes and writes ``thought_attention-<device>.json``; under pytest a part of it is measured.
Every contender is checked before it is timed, and all are timed in turn; one that cannot run is absent, with the
reason.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from attention_cases import Grid, Work
from attention_peers import Peer, Unsupported, packed_peers, step_peers
from device_limits import Limits, describe, device_name, measure_limits, slug, versions
from paired import Call, Time, TurnFailed, clock_of, median_ratio, rehearse, take_turns
from torch import Tensor

from qstar_kernels import thought_attention, thought_attention_step
from qstar_kernels.testing import AttentionCase

RESULTS = Path(__file__).parent / "results"
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
ROUNDS = {"fewest": 3, "most": 20, "seconds": 2.0}

CPU_CASE = AttentionCase(batch=1, heads=8, kv_heads=4, rationales=1, tokens=12, width=64, value_width=64)
CPU_CASES = [CPU_CASE._replace(positions=positions) for positions in (128, 256, 512, 1024)]


def gpu_case(positions: int, tokens: int = 16, width: int = 128) -> AttentionCase:
    """Heads as in Llama; from 1024 positions on the batch keeps the number of text tokens."""
    heads = 16 if width == 256 else 32
    batch = min(8, 8192 // positions)
    return AttentionCase(batch, heads, 8, positions, 1, tokens, width, width)


GPU_CASES = [  # the most telling first, since time may run out
    gpu_case(1024),
    gpu_case(256, tokens=12),
    gpu_case(256),
    gpu_case(4096),
    gpu_case(2048),
    gpu_case(512),
    gpu_case(1024, width=64),
    gpu_case(1024, width=256),
    gpu_case(1024, tokens=8),
    gpu_case(1024, tokens=24),
]
QUICK = 2  # cases of a quick run


def works(case: AttentionCase) -> Iterator[Work]:
    yield Work(case, "forward")
    yield Work(case, "forward_backward")
    for filled in (1, case.tokens // 2, case.tokens):
        yield Work(case, "step", filled)


class Contender(NamedTuple):
    """One that runs and is right; ``peak_bytes`` beyond its inputs, ``error`` the largest relative one."""

    call: Call
    peak_bytes: int
    error: float
    note: str


class DeviceLost(RuntimeError):
    """A contender left the GPU in a state in which nothing runs any more."""


def ours(work: Work, backend: str) -> Callable[..., Callable[..., Tensor]]:
    if work.kind == "step":
        return lambda *_: partial(thought_attention_step, step=work.filled - 1, backend=backend)
    return lambda *_: partial(thought_attention, backend=backend)


def contenders(work: Work, device: torch.device) -> list[Peer]:
    """Ours first. On a CPU the backends "auto" and "torch" are the same."""
    mine = [Peer("ours", ours(work, "auto"))]
    if device.type != "cpu":
        mine.append(Peer("ours_torch", ours(work, "torch")))
    return mine + (step_peers(device) if work.kind == "step" else packed_peers(device))


def prepare(peer: Peer, work: Work, grid: Grid) -> Call:
    """The call that is timed: its results are what :meth:`Grid.check` takes."""
    if work.kind == "step":
        q, k_text, v_text, k_cache, v_cache = grid.step_inputs(work.filled)
        if not peer.name.startswith("ours"):  # ours takes the whole cache, the others a view of what is filled
            k_cache, v_cache = (x[:, :, :, :, : work.filled] for x in (k_cache, v_cache))
        inputs = (q, k_text, v_text, k_cache, v_cache)
    else:
        inputs = grid.leaves
    with torch.no_grad():
        attend = peer.prepare(*inputs)

    def forward():
        with torch.no_grad():
            return (attend(*inputs),)

    def forward_backward():
        out = attend(*inputs)
        return (out, *torch.autograd.grad(out, grid.leaves, grid.do))

    return forward_backward if work.kind == "forward_backward" else forward


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


def rehearse_all(work: Work, grid: Grid) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that run and are right, and why the others are absent."""
    device = grid.q.device
    ready, absent = {}, {}
    for peer in contenders(work, device):
        if peer.name in ready:
            continue
        try:
            call = prepare(peer, work, grid)
            results, peak = rehearse(call, device)
            error = grid.check(work, results)
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


def rounded(tree: dict) -> dict:
    """With five significant digits: what is measured has no more."""
    return json.loads(json.dumps(tree), parse_float=lambda digits: float(f"{float(digits):.5g}"))


def measure(work: Work, grid: Grid, limits: Limits) -> dict:
    """Check and time every contender of one pass; the record that the JSON holds."""
    device, case = grid.q.device, work.case
    ready, absent = rehearse_all(work, grid)
    times = time_all(ready, absent, device)
    bound, flops = work.bound(limits, grid.q.element_size()), work.useful_flops()
    records = {}
    for name, own in times.items():
        seconds = statistics.median(each.seconds for each in own)
        records[name] = {
            "ms": 1e3 * seconds,
            "times_ours": median_ratio(own, times["ours"]),
            "useful_tflop_per_s": flops / seconds / 1e12,
            "fraction_of_bound": bound["bound_ms"] / (1e3 * seconds),
            "peak_mib": ready[name].peak_bytes / 2**20,
            "error": ready[name].error,
            "rounds": len(own),
        }
        if device.type != "cpu":
            records[name]["host_ms"] = 1e3 * statistics.median(each.host for each in own)
        if ready[name].note:
            records[name]["note"] = ready[name].note
    return {
        "pass": work.name,
        "positions": case.positions,
        "batch": case.batch,
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "tokens": case.tokens,
        "width": case.width,
        "dtype": str(grid.q.dtype).removeprefix("torch."),
        "useful_gflop": flops / 1e9,
        "mask_mib": work.mask_entries * grid.q.element_size() / 2**20,
        **bound,
        "contenders": records,
        "absent": absent,
    }


# Under pytest


@cache
def limits_of(device: torch.device) -> Limits:
    return measure_limits(device, DTYPE[device.type])


def this_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def benchmarked_cases() -> list[AttentionCase]:
    return CPU_CASES if this_device().type == "cpu" else GPU_CASES[:QUICK]


@pytest.mark.parametrize("kind", ["forward", "forward_backward", "step"])
@pytest.mark.parametrize("case", benchmarked_cases(), ids=lambda case: f"{case.positions}")
def test_thought_attention(benchmark, case, kind):
    device = this_device()
    grid = Grid(case, DTYPE[device.type], device)
    work = Work(case, kind, filled=case.tokens if kind == "step" else 0)
    record = rounded(measure(work, grid, limits_of(device)))
    info = benchmark.extra_info
    info |= {field: record[field] for field in ("useful_gflop", "mask_mib", "bound_ms")}
    for name, fields in record["contenders"].items():
        info |= {f"{field}_{name}": value for field, value in fields.items()}
    info |= {f"absent_{name}": why for name, why in record["absent"].items()}

    call = prepare(Peer("ours", ours(work, "auto")), work, grid)

    def finished():
        call()
        if device.type != "cpu":
            torch.cuda.synchronize(device)

    benchmark.pedantic(finished, rounds=2)


# As a command


def headline(record: dict) -> str:
    by = "matrix products" if record["matrix_ms"] > record["memory_ms"] else "memory"
    heads = f"{record['heads']}/{record['kv_heads']}"
    return (
        f"{record['pass']}: N {record['positions']}, T {record['tokens']}, D {record['width']}, B {record['batch']}, "
        f"heads {heads}, {record['dtype']}; bound {record['bound_ms']:.3g} ms ({by})"
    )


def table(record: dict) -> Iterator[str]:
    for name, own in record["contenders"].items():
        yield (
            f"  {name:<18} {own['ms']:>10.3f} ms {own['useful_tflop_per_s']:>9.3g} TFLOP/s"
            f" {own['fraction_of_bound']:>6.1%} of the bound {own['times_ours']:>7.2f} x ours"
            f" {own['peak_mib']:>9.1f} MiB"
        )
    for why in dict.fromkeys(record["absent"].values()):
        names = ", ".join(name for name, given in record["absent"].items() if given == why)
        yield f"  absent: {names} ({why})"


def write(path: Path, results: dict) -> None:
    """Whole or not at all, since a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(rounded(results), indent=1) + "\n")
    part.replace(path)


def run(device: torch.device, cases: list[AttentionCase], path: Path, limit_seconds: float) -> None:
    began = time.monotonic()
    dtype = DTYPE[device.type]
    limits = measure_limits(device, dtype)
    results = {
        "benchmark": "thought_attention",
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
    for case in cases:
        grid = None
        for work in works(case):
            label = f"{work.name}, N {case.positions}, T {case.tokens}, D {case.width}"
            if time.monotonic() - began > limit_seconds:
                results["not_run"].append({"case": label, "why": "the time was up"})
                continue
            try:
                grid = grid or Grid(case, dtype, device)
                record = measure(work, grid, limits)
            except Exception as failure:
                results["not_run"].append({"case": label, "why": reason(failure)})
                print(f"{label}: not run: {reason(failure)}", flush=True)
            else:
                results["cases"].append(record)
                print(headline(record), *table(record), sep="\n", flush=True)
            write(path, results)
            free_memory(device, after=label)
    write(path, results)
    print(f"{len(results['cases'])} cases in {path}, {len(results['not_run'])} not run")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time thought attention beside its peers and write a JSON.")
    parser.add_argument("--quick", action="store_true", help=f"only the first {QUICK} sizes")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    device = this_device()
    cases = CPU_CASES if device.type == "cpu" else GPU_CASES
    path = options.out / f"thought_attention-{slug(device_name(device))}.json"
    run(device, cases[: QUICK if options.quick else None], path, options.limit_seconds)


if __name__ == "__main__":
    main()
