"""The command for a new GPU, with stages that need none: time-outs, failures, what is kept, figures beside goals."""

import json
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

import on_this_gpu as survey
from lab import goals
from lab import gpu_stages as stages

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

GPU = {"device": {"type": "cuda", "name": "a card"}, "versions": {"torch": "2.11.0"}}


def fake(code: str, *others: str, seconds: float = 10.0, read=None) -> stages.Stage:
    """A stage of a Python process for each code."""
    commands = [stages.python("-c", each) for each in (code, *others)]
    return stages.Stage("runs Python", seconds, lambda room: commands, read or (lambda room, logs: {"printed": logs}))


def is_running(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_stages_that_fit_share_the_time_by_their_least_seconds():
    given = {name: fake("", seconds=seconds) for name, seconds in (("a", 100), ("b", 200), ("c", 100), ("d", 1))}
    assert survey.those_that_fit(given, 400) == ["a", "b", "c"]
    assert survey.those_that_fit(given, 299) == ["a"]
    assert survey.those_that_fit(given, 99) == []
    assert survey.budget(given["a"], [given["b"], given["c"]], 800) == 200
    assert survey.budget(given["b"], [given["c"]], 750) == 500  # a left some of its share
    assert survey.budget(given["c"], [], 60) == 60


def test_by_default_there_is_time_for_every_stage():
    assert survey.those_that_fit(stages.STAGES, survey.SECONDS) == list(stages.STAGES)


def test_the_help_says_what_each_stage_does():
    done = subprocess.run([sys.executable, BENCHMARKS / "on_this_gpu.py", "--help"], capture_output=True, text=True)
    assert all(f"  {name} " in done.stdout and stage.what in done.stdout for name, stage in stages.STAGES.items())


@pytest.mark.slow
def test_a_failure_a_time_out_and_a_missing_tool_stop_no_other_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "SANITIZER", "no-such-sanitizer")
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\n"
        "print('begun', flush=True)\ntime.sleep(60)"
    )
    given = {
        "fails": fake("print('half'); raise SystemExit(3)", "print('whole')", seconds=1),
        "hangs": fake(hangs, "print('beside')", seconds=1),
        "absent": stages.STAGES["sanitizer"]._replace(seconds=1),
        "unknown": stages.Stage("starts nothing", 1, lambda room: [("/no/such/program",)], lambda room, logs: {}),
        "unreadable": fake("", seconds=1, read=lambda room, logs: 1 / 0),
        "right": fake("import lab.goals, qstar_kernels; print(qstar_kernels.__file__)", seconds=1),
    }
    out = tmp_path / "out"
    summary = survey.run_stages(given, GPU, out, 24)
    assert summary == json.loads((out / "summary.json").read_text())
    found = summary["stages"]
    assert {name: record["ended"] for name, record in found.items()} == {
        "fails": "failed",
        "hangs": "killed for time",
        "absent": "unavailable",
        "unknown": "failed",
        "unreadable": "well",
        "right": "well",
    }
    assert found["fails"]["exit_codes"] == [3, 0] and found["hangs"]["exit_codes"] == [None, 0]
    assert found["fails"]["found"] == {"printed": ["half\n", "whole\n"]}
    assert {name: survey.headline(name, record) for name, record in found.items()} == {
        "fails": "half",
        "hangs": "begun",
        "absent": "no-such-sanitizer is not installed (it comes with the CUDA toolkit)",
        "unknown": "FileNotFoundError: [Errno 2] No such file or directory: '/no/such/program'",
        "unreadable": "ZeroDivisionError: division by zero",
        "right": "",
    }
    assert found["hangs"]["found"] == {"printed": ["begun\n", "beside\n"]}
    assert found["hangs"]["budget_seconds"] - 1 < found["hangs"]["seconds"] < found["hangs"]["budget_seconds"] + 5
    assert "no-such-sanitizer is not installed" in found["absent"]["why"]
    assert found["unreadable"]["found"] == {"unreadable": "ZeroDivisionError: division by zero"}
    [path] = found["right"]["found"]["printed"]
    assert Path(path.strip()).is_relative_to(BENCHMARKS.parent)
    for _ in range(50):
        if not is_running(int(child.read_text())):
            break
        time.sleep(0.1)
    assert not is_running(int(child.read_text()))
    assert "no such program" in (out / "log.txt").read_text().lower().replace("/", " ")


def test_the_summary_is_written_after_every_stage(tmp_path):
    def read(room, logs):
        return {"before": sorted(json.loads((room.out / "summary.json").read_text())["stages"])}

    given = {"first": fake(""), "second": fake("", read=read), "last": fake("", seconds=1000)}
    summary = survey.run_stages(given, GPU, tmp_path, 100)
    assert summary["stages"]["second"]["found"] == {"before": ["first"]}
    assert summary["not_started"] == {"last": "1000 s are its least, which were not left"}


def test_another_run_on_the_same_device_adds_to_the_folder(tmp_path):
    survey.run_stages({"one": fake("")}, GPU, tmp_path, 100)
    summary = survey.run_stages({"two": fake("raise SystemExit(1)")}, GPU, tmp_path, 100)
    assert {name: each["ended"] for name, each in summary["stages"].items()} == {"one": "well", "two": "failed"}
    assert (tmp_path / "log.txt").read_text().count("#####") == 4
    other = survey.run_stages({"two": fake("")}, {"device": {"name": "another"}}, tmp_path, 100)
    assert list(other["stages"]) == ["two"]


def test_all_stages_leave_their_results_and_nothing_else(tmp_path, monkeypatch):
    """Where each writes all that it is asked to."""
    written = tmp_path / "write.py"
    written.write_text(
        "import sys, pathlib\n"
        "for name, value in zip(sys.argv, sys.argv[1:]):\n"
        "    path = pathlib.Path(value)\n"
        "    if name == '--write': path.write_text('{'); path.with_suffix('.part').write_text('')\n"
        "    if name == '--record': path.write_text('{}')\n"
        "    if name == '--output-dir': path.mkdir(); (path / 'report.json').write_text('{}')\n"
        "    if name == '--out': (path / (pathlib.Path(sys.argv[1]).stem + '-a-card.json')).write_text('{}')\n"
    )
    monkeypatch.setattr(stages, "python", lambda *arguments: (sys.executable, written, *arguments))
    monkeypatch.setattr(stages, "sanitizer", lambda: sys.executable)
    out = tmp_path / "out"
    survey.run_stages(stages.STAGES, GPU, out, sum(stage.seconds for stage in stages.STAGES.values()) + 60)
    assert {path.name for path in out.iterdir()} == {
        "summary.json",
        "log.txt",
        *(f"bench_{name}-a-card.json" for name in ("thought_attention", "lm_head", "llama_step")),
        *(f"tiles-{name}.json" for name in ("thought_attention", "lm_head")),
    }


def test_a_long_log_is_cut_in_its_middle(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "LOG_BYTES", 10)
    (tmp_path / "log").write_bytes(b"begin" + b"." * 100 + b"\rend\xff")
    assert survey.shortened(tmp_path / "log") == "begin\n[... 100 bytes left out ...]\n\nend\ufffd"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path):
    command = [sys.executable, BENCHMARKS / "on_this_gpu.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "needs a CUDA device: torch.cuda.is_available() is False" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_every_kernel_is_launched_for_the_sanitizer():
    pytest.importorskip("triton")
    every_kernel = import_module("lab.every_kernel")
    assert set(every_kernel.PARTS) == set(stages.PARTS)
    small = every_kernel.PLAIN._replace(batch=1, positions=3, heads=2, kv_heads=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with every_kernel.counted() as counts:
        every_kernel.attend(small, torch.float32, device)
        every_kernel.PARTS["head-float32"](device)
    places = ("thought_attention.triton.forward", "thought_attention.triton.backward", "thought_attention.triton.step")
    places += ("lm_head.triton.mix_kernels", "lm_head.triton.row_kernels", "lm_head.triton.sample_kernels")
    modules = [import_module(f"qstar_kernels.{place}") for place in places] + [import_module("peers.epilogue_sampling")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert set(counts) == kernels and min(counts.values()) > 0


def test_the_row_of_tests_is_met_where_all_ran_and_some_on_the_gpu():
    found = {"chosen": 5, "passed": 2, "failed": 2, "skipped": 1, "on_gpu": 2}
    assert survey.check_row({"tests": {"found": found}}) == goals.Row(
        "kernels' tests that failed", "none, all run", 2, False
    )
    right = found | {"failed": 0, "passed": 4}
    assert survey.check_row({"tests": {"found": right}}).met is True
    assert survey.check_row({"tests": {"found": right | {"on_gpu": 0}}}).met is False
    assert survey.check_row({"tests": {"found": right | {"passed": 3}}}).met is False  # one did not run
    assert survey.check_row({}).met is None


def test_the_summary_holds_the_figures_of_the_results_in_its_folder(tmp_path):
    ours = {"ms": 2.5, "times_ours": 1.0, "useful_tflop_per_s": 480.0}
    forward = {**goals.SHAPE, "pass": "forward", "useful_gflop": 1200.0, "contenders": {"ours": ours}}
    results = json.dumps({"benchmark": "thought_attention", "cases": [forward]})
    path = tmp_path / "thought_attention-a-card.json"
    code = f"import pathlib; pathlib.Path({str(path)!r}).write_text({results!r})"
    report = {"scores": {goals.THINKING: {"accuracy": 1.0, "log_likelihood": -0.7}}}
    given = {"attention": fake(code), "train": fake("", read=lambda room, logs: report)}
    summary = survey.run_stages(given, GPU, tmp_path, 60)
    found = {row["what"]: (row["measured"], row["met"]) for row in summary["figures"]}
    assert found["ours: forward"] == (480.0, True) and found["kernels' tests that failed"] == (None, None)
    assert found["embedded default, log-likelihood with its thoughts"] == (-0.7, False)
    printed = survey.tables(summary)
    assert "100.0% right with its thoughts" in printed
    assert "ours: backward" in printed and "at least 300 TFLOP/s" in printed and "not measured" in printed
    assert max(map(len, printed.splitlines())) < 120
