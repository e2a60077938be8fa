"""Thought attention against every other way to compute it, and against what the device can do.

    python benchmarks/bench_thought_attention.py [--quick] [--seconds S] [--out FOLDER]

prints a table while it goes and writes ``thought_attention-<device>.json``; under pytest a part of it is measured.
Every contender is checked before it is timed, and all are timed in turn; one that cannot run is absent, with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from lab.device_limits import Limits
from lab.paired import Call
from lab.results_file import (
    DTYPE,
    Job,
    Peer,
    Unsupported,
    limits_of,
    measure_peers,
    parse_options,
    report,
    run,
    this_device,
)
from peers.attention import packed_peers, step_peers
from peers.attention_cases import Grid, Work
from qstar_kernels import thought_attention, thought_attention_step
from qstar_kernels.testing import AttentionCase

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


def ours(work: Work, backend: str) -> Callable[..., Callable[..., Tensor]]:
    if work.kind == "step":
        return lambda *_: partial(thought_attention_step, step=work.filled - 1, backend=backend)
    return lambda *_: partial(thought_attention, backend=backend)


def contenders(work: Work, device: torch.device) -> list[Peer]:
    """Ours first. On a CPU the backends "auto" and "torch" are the same."""
    mine = [Peer("ours", ours(work, "auto"))]
    if device.type != "cpu":
        mine.append(Peer("ours_torch", ours(work, "torch")))
    if device.type == "cuda" and work.kind != "step" and torch.cuda.get_device_capability(device) == (9, 0):
        mine += [Peer(name, ours(work, "triton")) for name in ("ours_triton", "ours_hopper")]
    return mine + (step_peers(device) if work.kind == "step" else packed_peers(device))


def kernels_of(peer: Peer, work: Work) -> AbstractContextManager:
    """Inside, a contender's kernels are the ones that it is named after; else those that the table of tiles chooses."""
    if peer.name not in ("ours_triton", "ours_hopper"):
        return nullcontext()
    from qstar_kernels.thought_attention import cases  # with Triton, which is not everywhere

    if peer.name == "ours_triton":
        return cases.otherwise_plain("")
    if work.case.width not in cases.hopper.TILES["hopper_forward"]:
        raise Unsupported(f"the Hopper kernels do not take rows of {work.case.width} values")
    return cases.all_for_hopper(work.case.width)


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
        with torch.no_grad(), kernels_of(peer, work):
            return (attend(*inputs),)

    def forward_backward():
        with kernels_of(peer, work):
            out = attend(*inputs)
            return (out, *torch.autograd.grad(out, grid.leaves, grid.do))

    return forward_backward if work.kind == "forward_backward" else forward


def measure(work: Work, grid: Grid, limits: Limits) -> dict:
    """Check and time every contender of one pass; the record that the JSON holds."""
    device, case = grid.q.device, work.case
    bound, flops = work.bound(limits, grid.q.element_size()), work.useful_flops()
    records, absent = measure_peers(
        contenders(work, device),
        lambda peer: prepare(peer, work, grid),
        lambda _, results: grid.check(work, results),
        flops,
        bound["bound_ms"],
        device,
    )
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


def benchmarked_cases() -> list[AttentionCase]:
    return CPU_CASES if this_device().type == "cpu" else GPU_CASES[:QUICK]


@pytest.mark.parametrize("kind", ["forward", "forward_backward", "step"])
@pytest.mark.parametrize("case", benchmarked_cases(), ids=lambda case: f"{case.positions}")
def test_thought_attention(benchmark, case, kind):
    device = this_device()
    grid = Grid(case, DTYPE[device.type], device)
    work = Work(case, kind, filled=case.tokens if kind == "step" else 0)
    record = measure(work, grid, limits_of(device))
    call = prepare(Peer("ours", ours(work, "auto")), work, grid)
    report(benchmark, record, ("useful_gflop", "mask_mib", "bound_ms"), call, device)


# As a command


def headline(record: dict) -> str:
    by = "matrix products" if record["matrix_ms"] > record["memory_ms"] else "memory"
    heads = f"{record['heads']}/{record['kv_heads']}"
    return (
        f"{record['pass']}: N {record['positions']}, T {record['tokens']}, D {record['width']}, B {record['batch']}, "
        f"heads {heads}, {record['dtype']}; bound {record['bound_ms']:.3g} ms ({by})"
    )


def jobs(cases: list[AttentionCase], device: torch.device) -> Iterator[Job]:
    for case in cases:
        grid = cache(partial(Grid, case, DTYPE[device.type], device))  # made once for all passes of a size
        for work in works(case):
            label = f"{work.name}, N {case.positions}, T {case.tokens}, D {case.width}"
            yield Job(label, lambda limits, work=work, grid=grid: measure(work, grid(), limits), headline)


def main() -> None:
    options = parse_options(
        "Time thought attention beside its peers and write a JSON.", f"the first {QUICK} sizes only"
    )
    device = this_device()
    cases = (CPU_CASES if device.type == "cpu" else GPU_CASES)[: QUICK if options.quick else None]
    run("thought_attention", device, jobs(cases, device), options.out, options.seconds)


if __name__ == "__main__":
    main()
