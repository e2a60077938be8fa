"""The device that a benchmark runs on, and its limits: measured in the same run, not taken from a table."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from lab.paired import Call, Time, clock_of

RUNS = 10
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}


class Limits(NamedTuple):
    """Operations per second of a large matrix product, and bytes per second, read and written, of a large copy."""

    matrix_flops: float
    bandwidth: float


def best(call: Call, clock: Callable[[Call], Time]) -> float:
    """Seconds of the fastest of several runs, since nothing should beat a limit."""
    call()
    return min(clock(call).seconds for _ in range(RUNS))


def measure_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    clock = clock_of(device)
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    matrix_flops = 2 * size**3 / best(lambda: torch.mm(a, b, out=product), clock)
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return Limits(matrix_flops, 2 * source.nbytes / best(lambda: target.copy_(source), clock))


def device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return torch.cuda.get_device_name(device)
    table = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", table.read_text()) if table.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict:
    """The device as the results name it."""
    info = {"type": device.type, "name": device_name(device)}
    if device.type == "cpu":
        return info | {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    properties = torch.cuda.get_device_properties(device)
    return info | {
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def versions() -> dict[str, str | None]:
    try:
        import triton
    except ImportError:
        triton = None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
    }


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
