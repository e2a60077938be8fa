"""What a machine has: processors, memory, GPUs, threads and disks, and which backend each op has on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

from qstar.doctor.findings import Finding
from qstar_kernels import explain

GIB = 2**30
LITTLE_DISK, LEAST_DISK = 10 * GIB, GIB
NVIDIA = ("/dev/nvidiactl", "/usr/lib/wsl/lib/libnvidia-ml.so.1")  # where there is a GPU, under Linux and under WSL
CGROUP = Path("/sys/fs/cgroup/memory.max")


def best_device() -> torch.device:
    """Where models run here, as the commands choose it."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_machine() -> list[Finding]:
    """Of the processors, the threads, the GPUs, the backends and the disks."""
    cores = usable_cores()
    return [
        Finding("ok", "cpu", f"{platform.machine()}, {cores} cores, {memory()} of memory"),
        threads_finding(torch.get_num_threads(), cores, os.environ.get("OMP_NUM_THREADS")),
        *gpu_findings(),
        *backend_findings(),
        disk_finding("working folder", Path.cwd()),
        disk_finding("hub cache", Path(HF_HUB_CACHE)),
        *offline_findings(HF_HUB_OFFLINE),
    ]


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(limit: Path = CGROUP) -> str:
    """The machine's memory, or what a container may have of it, which ``limit`` holds."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return "an unknown amount"
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
        most = min(most, int(text))
    return f"{most / GIB:.1f} GiB"


def threads_finding(threads: int, cores: int, setting: str | None) -> Finding:
    """Of how many threads torch computes with; ``setting`` is OMP_NUM_THREADS."""
    found = f"torch computes with {threads}, on {cores} cores"
    if setting is not None:
        found += f"; OMP_NUM_THREADS is {setting}"
    if threads > cores:
        return Finding("note", "threads", found, "more threads than cores wait for each other: set OMP_NUM_THREADS")
    if setting is not None and threads < cores:
        return Finding("note", "threads", found, "without OMP_NUM_THREADS torch takes one for each core")
    return Finding("ok", "threads", found)


def gpu_findings() -> list[Finding]:
    """Of every GPU that torch finds, or why it finds none."""
    if not torch.cuda.is_available():
        driver = any(Path(path).exists() for path in NVIDIA)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        build = (
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {x}" if (x := torch.version.hip) else None
        )
        apple = torch.backends.mps.is_available()
        return [no_gpu_finding(build, driver=driver, visible=visible, apple=apple)]
    return [gpu_finding(index) for index in range(torch.cuda.device_count())]


def gpu_finding(index: int) -> Finding:
    """Of one GPU."""
    properties = torch.cuda.get_device_properties(index)
    free, whole = (size / GIB for size in torch.cuda.mem_get_info(index))
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    found = f"{properties.name}, compute capability {capability}, {free:.1f} of {whole:.1f} GiB free"
    if free < whole / 2:
        return Finding("note", f"gpu {index}", found, "another process has most of its memory: see nvidia-smi")
    return Finding("ok", f"gpu {index}", found)


def no_gpu_finding(build: str | None, *, driver: bool, visible: str | None, apple: bool = False) -> Finding:
    """Of a machine on which torch finds no GPU.

    Args:
        build: what torch is built for beside CPUs.
        driver: there is a driver of NVIDIA.
        visible: CUDA_VISIBLE_DEVICES.
        apple: there is a GPU of Apple.
    """
    if apple:
        return Finding("note", "gpu", "Apple's is not used: it lacks float64, which the sampler needs")
    if visible is not None and driver:
        return Finding("note", "gpu", f"none is seen: CUDA_VISIBLE_DEVICES is {visible!r}", "unset it to use one")
    if build is None and driver:
        advice = "install torch for CUDA, as pytorch.org says"
        return Finding("problem", "gpu", "there is a driver of NVIDIA, but torch is built for CPUs", advice)
    if driver:
        advice = "see that nvidia-smi works, and that its CUDA version is not below torch's"
        return Finding("problem", "gpu", f"there is a driver of NVIDIA, but torch, for {build}, finds no GPU", advice)
    return Finding("ok", "gpu", "none" if build is None else f"none; torch is built for {build}")


def backend_findings() -> list[Finding]:
    """Of the backend that each op has on the device at hand, and why."""
    device = best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        backend_finding(each.op, each.backend, str(each).removeprefix(f"{each.op}: "), gpu=device.type == "cuda")
        for each in explain(device, dtype)
    ]


def backend_finding(op: str, backend: str, reason: str, *, gpu: bool) -> Finding:
    """Of the backend of one op; on a GPU it should be triton."""
    if not gpu or backend == "triton":
        return Finding("ok", op, reason)
    if "Triton is installed, but" in reason:
        advice = "install triton in the version that this torch requires: pip install --force-reinstall torch"
        return Finding("problem", op, reason, advice)
    return Finding("note", op, reason, "plain PyTorch is right, but slower")


def disk_finding(what: str, folder: Path) -> Finding:
    """Of the disk that a folder is on, or would be made on."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}, {free / GIB:.1f} GiB free"
    if not os.access(there, os.W_OK):
        return Finding(
            "note", what, f"{found}, but it cannot be written to", "name other folders: --output-dir, HF_HOME"
        )
    if free < LEAST_DISK:
        return Finding("problem", what, found, "make room: a model, its checkpoints and data would not fit")
    if free < LITTLE_DISK:
        return Finding(
            "note", what, found, "little for checkpoints: --save-total-limit or --save-only-model saves some"
        )
    return Finding("ok", what, found)


def offline_findings(offline: bool) -> Iterable[Finding]:
    """Of HF_HUB_OFFLINE, where it is set."""
    if offline:
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: only what the cache holds is found by its hub name")
