"""How long a call spends in ranges that it opens by name, with ``torch.profiler.record_function``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from lab.paired import Call


def seconds_by_range(call: Call, names: Iterable[str], device: torch.device) -> dict[str, float]:
    """Seconds in each range of one call, under the profiler; of a range that is opened several times, their sum.

    On a CPU wall time. On a GPU the time of the kernels and copies that were launched while the range was open, by
    whichever thread (a backward has its own), without the gaps between them. A range inside another counts in both.

    Raises:
        LookupError: the call did not open one of them.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
    return {name: microseconds(events, name, on_gpu=on_gpu) / 1e6 for name in names}


def microseconds(events: Sequence[FunctionEvent], name: str, *, on_gpu: bool) -> float:
    """In the range ``name``, of what the host did (``events``): its own time, or that of what it launched."""
    spans = [event.time_range for event in events if event.name == name]
    if not spans:
        opened = sorted({event.name for event in events if event.is_user_annotation})
        raise LookupError(f"the call opened no range {name!r}, but only {opened}")
    if not on_gpu:
        return sum(span.elapsed_us() for span in spans)
    # The profiler draws ranges, an optimizer's own among them, on the GPU's timeline as well: those are no kernels.
    ranges = {event.name for event in events if event.is_user_annotation}
    return sum(
        kernel.duration
        for event in events
        for kernel in event.kernels
        if kernel.name not in ranges and any(span.start <= event.time_range.start <= span.end for span in spans)
    )
