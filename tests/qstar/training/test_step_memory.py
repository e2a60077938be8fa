import sys

import fresh_python
import pytest
import torch

from qstar.training import step_memory
from qstar.training.step_memory import StepMemory, kilobytes

CPU = torch.device("cpu")


HELD_IN_A_STEP = """
import torch
from qstar.training.step_memory import StepMemory

step = StepMemory(torch.device("cpu"))
gone = torch.ones(2**28, dtype=torch.uint8)  # a peak before the step is none of its
del gone
step.begin()
for _ in range(2):
    held = torch.ones(2**26, dtype=torch.uint8)
    del held
step.end()
print(step.peak - step.before, step.free)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux tells of a process")
def test_the_peak_of_a_step_is_what_it_held_at_once():
    """In a fresh process, which has no memory left from other tests."""
    taken, free = map(int, fresh_python.run(HELD_IN_A_STEP).split())
    assert abs(taken - 2**26) < 2**22 and 2**26 < free < 2**50  # Linux counts pages of a thread in heaps


@pytest.mark.parametrize(
    ("before", "peak", "free", "states", "expected"),
    [
        (100, 400, 1200, 100, 4500),  # 200 beside the gradients for 1000 tokens, and 0.9 of 1000 left
        (100, 200, 1200, 100, None),  # no more than the gradients
        (100, 400, 150, 100, 0),
        (None, 400, 1200, 100, None),
        (100, None, 1200, 100, None),
    ],
)
def test_the_largest_grid_fills_what_gradients_and_states_leave(before, peak, free, states, expected):
    step = StepMemory(CPU, before=before, peak=peak, free=free)
    assert step.largest_grid(1000, gradients=100, states=states) == expected


def test_without_a_file_of_linux_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(step_memory, "PROCESS", tmp_path)
    step = StepMemory(CPU)
    step.begin()
    step.end()
    assert (step.before, step.peak, step.free) == (None, None, None)
    assert step.largest_grid(1000, 0, 0) is None


def test_numbers_are_read_by_their_names(tmp_path):
    file = tmp_path / "status"
    file.write_text("VmPeak:\t     12 kB\nVmHWM:\t      7 kB\n")
    assert kilobytes(file, "VmHWM") == 7168
    with pytest.raises(OSError, match="status has no VmRSS"):
        kilobytes(file, "VmRSS")
