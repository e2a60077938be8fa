"""What a step takes of a device's memory, measured while it runs, and how large a grid it has room for."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

PROCESS = Path("/proc/self")  # of Linux; elsewhere a CPU's memory is not told
MACHINE = Path("/proc/meminfo")
SPARE = 0.9  # of the memory that is left: no two steps take the same


@dataclass
class StepMemory:
    """Bytes of the process on a CPU, of what torch has allocated on a GPU; None where the system does not tell.

    Attributes:
        device: where the step runs.
        before: held when the step began.
        peak: the most until :meth:`end`, or so far.
        free: when the step began.
    """

    device: torch.device
    before: int | None = None
    peak: int | None = None
    free: int | None = None

    def begin(self) -> None:
        """A step begins."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            unused = torch.cuda.memory_reserved(self.device) - self.before
            self.free = torch.cuda.mem_get_info(self.device)[0] + unused
        elif self.device.type == "cpu":
            with contextlib.suppress(OSError):
                (PROCESS / "clear_refs").write_text("5")  # from here on the peak is the step's
                self.before = kilobytes(PROCESS / "status", "VmRSS")
                self.free = kilobytes(MACHINE, "MemAvailable")

    def end(self) -> None:
        """Its gradients are there, and the optimizer has not begun."""
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        elif self.before is not None:
            self.peak = kilobytes(PROCESS / "status", "VmHWM")

    def largest_grid(self, tokens: int, gradients: int, states: int) -> int | None:
        """About how many tokens of a grid could be read at once; None where that cannot be told.

        Args:
            tokens: read at once in the step that was measured.
            gradients: bytes of those that the step has left.
            states: bytes of what the optimizer keeps from now on.
        """
        if self.before is None or self.peak is None or self.free is None:
            return None
        activations = self.peak - self.before - gradients
        if activations <= 0:  # lost among what the process held already
            return None
        return max(int(SPARE * (self.free - gradients - states) * tokens / activations), 0)


def kilobytes(path: Path, name: str) -> int:
    """The bytes behind a name in a file of Linux's.

    Raises:
        OSError: there is no such file, or no such name in it.
    """
    found = re.search(rf"^{name}:\s*(\d+) kB$", path.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{path} has no {name}")
    return 1024 * int(found[1])
