"""Contenders timed in turn in one run, and the memory that each one takes."""

import statistics
import time

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once in the storages made within it."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def compare(benchmark, contenders: dict, rounds: int) -> None:
    """Time the first contender, and beside it the ratio of every other to it, in rounds that run them in turn."""
    names = list(contenders)
    seconds = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    warm = {name: values[1:] for name, values in seconds.items()}
    for name in names:
        with PeakBytes() as watch:
            contenders[name]()
        benchmark.extra_info[f"peak_mib_{name}"] = round(watch.peak / 2**20, 1)
        benchmark.extra_info[f"median_ms_{name}"] = round(1e3 * statistics.median(warm[name]), 1)
    for name in names[1:]:
        ratios = [other / ours for other, ours in zip(warm[name], warm[names[0]], strict=True)]
        benchmark.extra_info[f"speedup_over_{name}"] = round(statistics.median(ratios), 2)
    benchmark.pedantic(contenders[names[0]], rounds=2)
