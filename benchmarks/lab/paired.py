"""Contenders timed in turn in one run, and the memory that each one takes, on a CPU or an NVIDIA GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = Callable[[], Any]


class Time(NamedTuple):
    """Seconds that a call took, and those until the host had handed it over; the same on a CPU."""

    seconds: float
    host: float


def cpu_clock(call: Call) -> Time:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Time(seconds, seconds)


class GpuClock:
    """Times calls on a GPU by events, with a cold L2 cache and without the gaps between launches.

    Before a call the cache is overwritten; then the GPU spins while the host queues the call's launches. The time is
    therefore that of the device, as in a captured graph or where the host runs ahead. ``Time.host`` is what queueing
    costs; a call that waits for the device inside keeps its gaps.
    """

    OVERWRITTEN = 2**28  # bytes, several times any L2 cache
    CYCLES_PER_SECOND = 2e9  # about the clock of a GPU: how long it spins need not be exact
    LONGEST_LEAD = 0.02

    def __init__(self, device: torch.device):
        self.device = device
        self.scratch = torch.empty(self.OVERWRITTEN, dtype=torch.int8, device=device)
        self.lead = 0.002

    def __call__(self, call: Call) -> Time:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        self.scratch.zero_()
        torch.cuda._sleep(int(self.lead * self.CYCLES_PER_SECOND))
        start.record()
        began = time.perf_counter()
        call()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        self.lead = min(max(self.lead, 2 * host), self.LONGEST_LEAD)
        return Time(start.elapsed_time(end) / 1e3, host)


def clock_of(device: torch.device) -> Callable[[Call], Time]:
    return cpu_clock if device.type == "cpu" else GpuClock(device)


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once in the storages made within it."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qstar_kernels":  # what an operator of ours makes inside counts as well
            device = torch._C._dispatch_key_for_device(args[0].device.type)
            with self:
                return func.redispatch(
                    torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device)), *args, **(kwargs or {})
                )
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def rehearse(call: Call, device: torch.device) -> tuple[Any, int]:
    """Warm a call up: its results, and the most bytes that it held at once beyond its inputs.

    On a GPU the first call compiles and loads kernels, so the second one counts.
    """
    if device.type == "cpu":
        with PeakBytes() as watch:
            results = call()
        return results, watch.peak
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    results = call()
    torch.cuda.synchronize(device)
    return results, torch.cuda.max_memory_allocated(device) - before


class TurnFailed(Exception):
    """A contender failed while it was timed; the cause is chained."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def take_turns(
    contenders: dict[str, Call],
    clock: Callable[[Call], Time],
    *,
    fewest: int,
    most: int,
    seconds: float = math.inf,
) -> dict[str, list[Time]]:
    """Times of every contender, in rounds that run them in turn.

    Each runs in the first ``fewest`` rounds, and on until it has run ``most`` times or for ``seconds``.
    """
    times = {name: [] for name in contenders}

    def runs_on(name: str) -> bool:
        own = times[name]
        return len(own) < fewest or (len(own) < most and sum(each.seconds for each in own) < seconds)

    for turn in range(most):
        names = [name for name in contenders if runs_on(name)]
        for name in names if turn % 2 else reversed(names):
            try:
                times[name].append(clock(contenders[name]))
            except Exception as error:
                raise TurnFailed(name) from error
    return times


def median_ratio(times: list[Time], base: list[Time]) -> float:
    """The median, over the rounds that both ran in, of the one's time over the other's."""
    return statistics.median(one.seconds / other.seconds for one, other in zip(times, base, strict=False))


def compare(benchmark, contenders: dict[str, Call], rounds: int) -> None:
    """On a CPU: time the first contender, and beside it the ratio of every other to it."""
    for name, call in contenders.items():
        _, peak = rehearse(call, torch.device("cpu"))
        benchmark.extra_info[f"peak_mib_{name}"] = round(peak / 2**20, 1)
    times = take_turns(contenders, cpu_clock, fewest=rounds, most=rounds)
    first = next(iter(contenders))
    for name, own in times.items():
        benchmark.extra_info[f"median_ms_{name}"] = round(1e3 * statistics.median(t.seconds for t in own), 1)
        if name != first:
            benchmark.extra_info[f"speedup_over_{name}"] = round(median_ratio(own, times[first]), 2)
    benchmark.pedantic(contenders[first], rounds=2)
