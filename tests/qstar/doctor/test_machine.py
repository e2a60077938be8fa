"""The machine: threads, GPUs, backends and disks, as each of them could be."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import qstar_kernels
from qstar.doctor import machine
from qstar.doctor.machine import GIB, backend_finding, backend_findings, disk_finding, no_gpu_finding, threads_finding
from qstar_kernels import backends


@pytest.mark.parametrize(
    ("threads", "cores", "setting", "state", "found"),
    [
        (8, 8, None, "ok", "torch computes with 8, on 8 cores"),
        (4, 8, None, "ok", "torch computes with 4, on 8 cores"),
        (1, 8, "1", "note", "torch computes with 1, on 8 cores; OMP_NUM_THREADS is 1"),
        (8, 8, "8", "ok", "torch computes with 8, on 8 cores; OMP_NUM_THREADS is 8"),
        (8, 2, None, "note", "torch computes with 8, on 2 cores"),
    ],
)
def test_threads_are_compared_with_cores(threads, cores, setting, state, found):
    finding = threads_finding(threads, cores, setting)
    assert (finding.state, finding.found) == (state, found)
    assert bool(finding.advice) == (state == "note")


def test_memory_is_what_a_container_may_have(tmp_path):
    whole = machine.memory(tmp_path / "none")
    (tmp_path / "limit").write_text(f"{GIB // 2}\n")
    (tmp_path / "no limit").write_text("max\n")
    assert machine.memory(tmp_path / "limit") == "0.5 GiB"
    assert machine.memory(tmp_path / "no limit") == whole
    assert float(whole.removesuffix(" GiB")) > 0.5


@pytest.mark.parametrize(
    ("build", "driver", "visible", "apple", "state", "found"),
    [
        (None, False, None, False, "ok", "none"),
        ("CUDA 13.0", False, None, False, "ok", "none; torch is built for CUDA 13.0"),
        (None, True, None, False, "problem", "there is a driver of NVIDIA, but torch is built for CPUs"),
        ("CUDA 13.0", True, None, False, "problem", "there is a driver of NVIDIA, but torch, for CUDA 13.0, finds no"),
        ("CUDA 13.0", True, "", False, "note", "none is seen: CUDA_VISIBLE_DEVICES is ''"),
        (None, False, None, True, "note", "Apple's is not used: it lacks float64"),
    ],
)
def test_a_machine_on_which_torch_finds_no_gpu(build, driver, visible, apple, state, found):
    finding = no_gpu_finding(build, driver=driver, visible=visible, apple=apple)
    assert finding.state == state and finding.found.startswith(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_backends_are_those_that_the_ops_explain():
    found = {each.what: each.found for each in backend_findings()}
    assert found == {each.op: f"{each.backend} ({each.reason})" for each in qstar_kernels.explain("cpu")}
    assert len(found) == 8 and {each.state for each in backend_findings()} == {"ok"}


def test_a_gpu_without_kernels_is_a_note_and_with_broken_ones_a_problem(monkeypatch):
    """The reasons are those that the choice gives for tensors on a GPU."""

    def reason() -> str:
        facts = backends.Facts(torch.device("cuda"), torch.bfloat16, (64,))
        return backends.decide("mix_hidden", "auto", {"thought": facts}).reason

    monkeypatch.setattr(backends, "load", lambda *place: ModuleNotFoundError("no triton", name="triton"))
    finding = backend_finding("mix_hidden", "torch", reason(), gpu=True)
    assert (finding.state, finding.found) == ("note", "triton is not installed")
    monkeypatch.setattr(backends, "load", lambda *place: ImportError("libcuda.so.1 is missing"))
    finding = backend_finding("mix_hidden", "torch", reason(), gpu=True)
    assert finding.state == "problem" and "libcuda.so.1 is missing" in finding.found
    assert backend_finding("mix_hidden", "triton", "fast", gpu=True).state == "ok"
    assert backend_finding("mix_hidden", "torch", "slow", gpu=False).state == "ok"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "state"),
    [(50 * GIB, "ok"), (10 * GIB, "ok"), (10 * GIB - 1, "note"), (GIB, "note"), (GIB - 1, "problem"), (0, "problem")],
)
def test_a_disk_should_have_room(tmp_path, monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100 * GIB, 0, free))
    finding = disk_finding("working folder", tmp_path / "not" / "yet")
    assert finding.state == state
    assert finding.found == f"{tmp_path / 'not' / 'yet'}, {free / GIB:.1f} GiB free"
    assert bool(finding.advice) == (state != "ok")


def test_a_folder_that_is_not_there_is_on_the_disk_of_those_above_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: asked.append(folder) or Usage(0, 0, 50 * GIB))
    disk_finding("hub cache", tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path)
    disk_finding("hub cache", Path("a/b"))
    assert asked == [tmp_path, tmp_path]


def test_a_folder_that_cannot_be_written_to_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.os, "access", lambda folder, mode: False)
    finding = disk_finding("working folder", tmp_path)
    assert finding.state == "note" and finding.found.endswith("but it cannot be written to")


def test_an_offline_hub_is_a_note():
    assert [each.state for each in machine.offline_findings(True)] == ["note"]
    assert list(machine.offline_findings(False)) == []


def test_all_of_the_machine_is_looked_at():
    found = [each.what for each in machine.check_machine()]
    ops = [each.op for each in qstar_kernels.explain("cpu")]
    gpu = [f"gpu {i}" for i in range(torch.cuda.device_count())] or ["gpu"]
    assert found[:13] == ["cpu", "threads", *gpu, *ops, "working folder", "hub cache"][:13]
