"""Seconds by named range: wall time on a CPU, and of what was launched on a GPU, also by another thread."""

import time

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import record_function

from lab.ranges import microseconds, seconds_by_range

CPU = torch.device("cpu")


def step():
    """Opens "outer" twice, for 30 ms, and "inner" in the second one, for 10 ms."""
    with record_function("outer"):
        time.sleep(0.01)
    time.sleep(0.05)
    with record_function("outer"):
        time.sleep(0.01)
        with record_function("inner"):
            time.sleep(0.01)


def test_wall_time_in_ranges_that_repeat_and_nest():
    whole = []

    def call():
        began = time.perf_counter()
        step()
        whole.append(time.perf_counter() - began)

    found = seconds_by_range(call, ["inner", "outer"], CPU)
    assert list(found) == ["inner", "outer"]
    slack = 1e-3  # between two clocks
    assert found["inner"] > 0.01 - slack
    assert found["outer"] > found["inner"] + 0.02 - slack
    assert found["outer"] < whole[0] - 0.05 + slack  # what lies between the two does not count


def test_a_range_of_a_backward_holds_its_operations():
    x = torch.randn(300, 300, requires_grad=True)
    loss = (x @ x @ x).sum()

    def call():
        with record_function("backward"):
            loss.backward()

    began = time.perf_counter()
    found = seconds_by_range(call, ["backward"], CPU)
    assert 0 < found["backward"] < time.perf_counter() - began
    assert x.grad is not None


def test_a_range_that_was_not_opened_is_named_beside_those_that_were():
    with pytest.raises(LookupError, match=r"no range 'qstar::learn', but only \['inner', 'outer'\]"):
        seconds_by_range(step, ["outer", "qstar::learn"], CPU)


def host_event(name, start, end, kernels=(), thread=1):
    event = FunctionEvent(
        len(name),
        name,
        thread,
        start,
        end,
        use_device="cuda",
        device_type=DeviceType.CPU,
        is_user_annotation=thread == 1,
    )
    for kernel, duration in kernels:
        event.append_kernel(kernel, 0, duration)
    return event


def test_kernels_count_where_they_were_launched():
    events = [
        host_event("think", 0, 10, [("think", 900.0), ("a kernel of its own", 5.0)]),
        host_event("aten::mm", 2, 3, [("gemm", 100.0)], thread=2),
        host_event("between", 11, 12, [("copy", 7.0)], thread=2),
        host_event("backward", 20, 30),
        host_event("MmBackward0", 21, 22, [("gemm", 200.0), ("gemm", 40.0)], thread=3),
        host_event("backward", 40, 50),
        host_event("Optimizer.step", 42, 48),
        host_event("aten::_fused_adam_", 43, 44, [("Optimizer.step", 700.0), ("adam", 3.0)], thread=2),
        host_event("AddBackward0", 49, 51, [("add", 1.0)], thread=3),
    ]
    assert microseconds(events, "think", on_gpu=True) == 105.0
    assert microseconds(events, "backward", on_gpu=True) == 244.0
    assert microseconds(events, "backward", on_gpu=False) == 20.0
    with pytest.raises(LookupError, match=r"no range 'talk', but only \['Optimizer.step', 'backward', 'think'\]"):
        microseconds(events, "talk", on_gpu=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ranges_of_a_gpu_share_its_time():
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device, requires_grad=True)

    def call():
        with record_function("forward"):
            loss = (x @ x).sum()
        with record_function("backward"):
            loss.backward()

    call()
    found = seconds_by_range(call, ["forward", "backward"], device)
    assert 0 < found["forward"] < found["backward"] < 10 * found["forward"]  # two products instead of one
