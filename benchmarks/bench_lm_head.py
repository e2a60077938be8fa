"""The language-model head against every other way to compute it, and against the matrix products that it needs.

    python benchmarks/bench_lm_head.py [--quick] [--seconds S] [--out FOLDER]

prints a table while it goes and writes ``lm_head-<device>.json``; under pytest a part of it is measured. Every
contender is checked before it is timed, and all are timed in turn; one that cannot run is absent, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import pytest
import torch

from lab.device_limits import Limits
from lab.goals import TIMES_PRODUCTS
from lab.paired import compare
from lab.results_file import DTYPE, Job, Peer, limits_of, measure_peers, parse_options, report, run, this_device
from peers.head import peers_of
from peers.head_cases import INPUTS, QUICK, SIZES, Inputs, Work
from qstar_kernels import sample_linear


def measure(work: Work, device: torch.device, limits: Limits) -> dict:
    """Check and time every contender of one pass; the record that the JSON holds."""
    dtype = DTYPE[device.type]
    inputs: Inputs = INPUTS[work.kind](work, dtype, device)

    def check(peer: Peer, results: tuple[torch.Tensor, ...]) -> float:
        return inputs.check_products(results) if peer.name == "products" else inputs.check(peer.name, results)

    bound, flops = work.bound(limits, dtype.itemsize), work.useful_flops()
    result_mib = work.result_bytes(dtype.itemsize) / 2**20
    peers = peers_of(work.kind, device)
    records, absent = measure_peers(peers, lambda peer: peer.prepare(inputs), check, flops, bound["bound_ms"], device)
    for name, record in records.items():
        if name != "products":  # its results lie in memory that was there
            record["extra_mib"] = record["peak_mib"] - result_mib
    return {
        "pass": work.kind,
        "rows": work.rows,
        "width": work.width,
        "vocabulary": work.vocabulary,
        "dtype": str(dtype).removeprefix("torch."),
        "useful_gflop": flops / 1e9,
        "result_mib": result_mib,
        **bound,
        "goal_times_products": TIMES_PRODUCTS,
        "contenders": records,
        "absent": absent,
    }


# Under pytest


@pytest.mark.parametrize("work", SIZES[this_device().type][: QUICK[this_device().type]], ids=lambda work: work.label)
def test_lm_head(benchmark, work):
    device = this_device()
    record = measure(work, device, limits_of(device))
    call = peers_of(work.kind, device)[0].prepare(INPUTS[work.kind](work, DTYPE[device.type], device))
    report(benchmark, record, ("useful_gflop", "result_mib", "bound_ms"), call, device)


@pytest.mark.skipif(this_device().type != "cpu", reason="compares times of the host")
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_sample_at_other_temperatures(benchmark, temperature):
    work = Work("sample", 512, 256, 32768)
    inputs = INPUTS[work.kind](work, torch.float32, this_device())
    hidden, weight = inputs.hidden, inputs.weight

    def ours():
        return sample_linear(hidden, weight, seed=0, temperature=temperature)

    def logits():
        z = hidden @ weight.T
        if temperature:
            tokens = torch.multinomial((z / temperature).softmax(-1), 1)[:, 0]
        else:
            tokens = z.argmax(-1)
        return tokens, z.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    for call in (ours, logits):
        inputs.check(call.__name__, call())
    compare(benchmark, {"ours": ours, "logits": logits}, rounds=3)


# As a command


def headline(record: dict) -> str:
    by = "matrix products" if record["matrix_ms"] > record["memory_ms"] else "memory"
    label = Work(*(record[field] for field in ("pass", "rows", "width", "vocabulary"))).label
    line = f"{label}, {record['dtype']}; bound {record['bound_ms']:.3g} ms ({by})"
    ratio = record["contenders"]["ours"].get("times_products")
    if ratio is not None:
        line += f"; ours takes {ratio:.2f} x the bare products, the goal is {TIMES_PRODUCTS}"
    return line


def jobs(works: Iterable[Work], device: torch.device) -> Iterator[Job]:
    for work in works:
        yield Job(work.label, partial(measure, work, device), headline)


def main() -> None:
    device = this_device()
    works, quick = SIZES[device.type], QUICK[device.type]
    options = parse_options("Time the head beside its peers and write a JSON.", f"the first {quick} passes only")
    run("lm_head", device, jobs(works[: quick if options.quick else None], device), options.out, options.seconds)


if __name__ == "__main__":
    main()
