"""The command for a new GPU, with stages that need none: time-outs, failures, what is kept, figures beside goals."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
goals = import_module("goals")
stages = import_module("gpu_stages")
survey = import_module("on_this_gpu")

GPU = {"device": {"type": "cuda", "name": "a card"}, "versions": {"torch": "2.11.0"}}


def fake(code: str, *others: str, seconds: float = 10.0, read=None) -> stages.Stage:
    """A stage of a Python process for each code."""
    commands = [stages.python("-c", each) for each in (code, *others)]
    return stages.Stage(seconds, lambda room: commands, read or (lambda room, logs: {"printed": logs}))


def is_running(process: int) -> bool:
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


# Running stages


def test_what_fits_runs_and_the_time_is_shared_by_need():
    given = {name: fake("", seconds=seconds) for name, seconds in (("a", 100), ("b", 200), ("c", 100), ("d", 1))}
    assert survey.those_that_fit(given, 400) == ["a", "b", "c"]
    assert survey.those_that_fit(given, 299) == ["a"]
    assert survey.those_that_fit(given, 99) == []
    assert survey.budget(given["a"], [given["b"], given["c"]], 800) == 200
    assert survey.budget(given["b"], [given["c"]], 750) == 500  # a left some of its share
    assert survey.budget(given["c"], [], 60) == 60


def test_the_default_stages_of_nine_minutes_are_the_most_telling():
    assert survey.those_that_fit(stages.STAGES, survey.LIMIT_SECONDS) == ["tests", "attention", "head", "step"]
    rest = dict(list(stages.STAGES.items())[4:])
    assert survey.those_that_fit(rest, survey.LIMIT_SECONDS) == list(rest)


def test_a_failure_a_time_out_and_a_missing_tool_stop_nothing(tmp_path, monkeypatch):
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
        "unknown": stages.Stage(1, lambda room: [("/no/such/program",)], lambda room, logs: {}),
        "unreadable": fake("", seconds=1, read=lambda room, logs: 1 / 0),
        "right": fake("import goals, qstar_kernels; print(qstar_kernels.__file__)", seconds=1),
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


def test_a_summary_is_there_after_every_stage(tmp_path):
    def read(room, logs):
        return {"before": sorted(json.loads((room.out / "summary.json").read_text())["stages"])}

    given = {"first": fake(""), "second": fake("", read=read), "last": fake("", seconds=1000)}
    summary = survey.run_stages(given, GPU, tmp_path, 100)
    assert summary["stages"]["second"]["found"] == {"before": ["first"]}
    assert summary["not_started"] == {"last": "for another call: it takes 1000 s"}


def test_another_call_on_the_same_device_adds_to_the_folder(tmp_path):
    survey.run_stages({"one": fake("")}, GPU, tmp_path, 100)
    summary = survey.run_stages({"two": fake("raise SystemExit(1)")}, GPU, tmp_path, 100)
    assert {name: each["ended"] for name, each in summary["stages"].items()} == {"one": "well", "two": "failed"}
    assert (tmp_path / "log.txt").read_text().count("#####") == 4
    other = survey.run_stages({"two": fake("")}, {"device": {"name": "another"}}, tmp_path, 100)
    assert list(other["stages"]) == ["two"]


def test_the_stages_leave_at_most_eight_files(tmp_path, monkeypatch):
    """Those of every stage, where each writes all that it is asked to."""
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
def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, BENCHMARKS / "on_this_gpu.py", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and "needs a CUDA device: torch.cuda.is_available() is False" in done.stderr
    assert not (tmp_path / "out").exists()


# What stages leave behind


def test_the_record_of_tests_says_how_they_ended_and_where_they_ran(tmp_path):
    (tmp_path / "conftest.py").write_text("import gpu_record\nMADE = [0]\ngpu_record.allocations = lambda: MADE[0]\n")
    (tmp_path / "test_several.py").write_text(
        "import pytest\nfrom conftest import MADE\n\n"
        "@pytest.fixture\ndef broken():\n    raise OSError('no fixture')\n\n"
        "def test_on_gpu():\n    MADE[0] += 1\n\n"
        "def test_on_cpu():\n    pass\n\n"
        "def test_wrong_on_gpu():\n    MADE[0] += 1\n    assert 1 == 2, 'not equal'\n\n"
        "def test_not_here():\n    pytest.skip('why')\n\n"
        "def test_of_a_fixture(broken):\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    for share in range(2):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_record", "."]
        options = ["--record", f"tests-{share}.json", "--share", f"{share}/2"]
        subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True)
    found = stages.read_checks(stages.Room(tmp_path, tmp_path, 1.0), [])
    failures = found.pop("failures")
    assert found == {"chosen": 5, "passed": 2, "failed": 2, "skipped": 1, "on_gpu": 2}
    assert failures == {
        "test_several.py::test_wrong_on_gpu": "AssertionError: not equal",
        "test_several.py::test_of_a_fixture": "OSError: no fixture",
    }
    assert survey.check_row({"tests": {"found": found}}) == goals.Row(
        "kernels' tests that failed", "none, all run", 2, False
    )
    right = found | {"failed": 0, "passed": 4}
    assert survey.check_row({"tests": {"found": right}}).met is True
    assert survey.check_row({"tests": {"found": right | {"on_gpu": 0}}}).met is False
    assert survey.check_row({"tests": {"found": right | {"passed": 3}}}).met is False  # one did not run
    assert survey.check_row({}).met is None


def test_what_tuning_printed():
    log = (
        "a card (sm_90)\n\nforward, bfloat16, width 128: 2 of 3 candidates fit and ran\n"
        "     0.900 ms  128x32 w8 s2 (chosen)\n     1.000 ms  64x32 w8 s2 (the table's)\n"
        "\nstep, bfloat16, width 128: 1 of 3 candidates fit and ran\n"
        "     2.000 ms  64x32 w8 s2 (the table's) (chosen)\n"
    )
    assert stages.read_tuning(None, [log]) == {
        "kernels": {
            "forward, bfloat16, width 128": {
                "chosen": "128x32 w8 s2: 0.900 ms",
                "the table's": "64x32 w8 s2: 1.000 ms",
            },
            "step, bfloat16, width 128": {"chosen": "64x32 w8 s2: 2.000 ms", "the table's": "64x32 w8 s2: 2.000 ms"},
        }
    }


def test_every_kernel_is_launched_for_the_sanitizer():
    pytest.importorskip("triton")
    every_kernel = import_module("every_kernel")
    assert set(every_kernel.PARTS) == set(stages.PARTS)
    small = every_kernel.PLAIN._replace(batch=1, positions=3, heads=2, kv_heads=1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with every_kernel.counted() as counts:
        every_kernel.attend(small, torch.float32, device)
        every_kernel.PARTS["head-float32"](device)
    places = ("thought_attention.triton.forward", "thought_attention.triton.backward", "thought_attention.triton.step")
    places += ("lm_head.triton.mix_kernels", "lm_head.triton.row_kernels", "lm_head.triton.sample_kernels")
    modules = [import_module(f"qstar_kernels.{place}") for place in places] + [import_module("epilogue_sampling")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert set(counts) == kernels and min(counts.values()) > 0


# Figures and goals


def contender(ms, times_ours=1.0, **figures):
    return {"ms": ms, "times_ours": times_ours, **figures}


def attention_case(name, gflop, contenders, **changes):
    return {**goals.SHAPE, "pass": name, "useful_gflop": gflop, "contenders": contenders, **changes}


ATTENTION = {
    "benchmark": "thought_attention",
    "cases": [
        attention_case(
            "forward",
            1200.0,
            {
                "ours": contender(2.5, useful_tflop_per_s=480.0),
                "ours_torch": contender(12.0, 4.8, useful_tflop_per_s=100.0),
                "ours_new": contender(2.0, 0.8, useful_tflop_per_s=600.0),
                "flex": contender(5.0, 2.0),
                "sdpa_cudnn": contender(4.0, 1.6),
            },
        ),
        attention_case(
            "forward + backward",
            4200.0,
            {"ours": contender(14.5), "ours_new": contender(10.0), "flex": contender(13.0, 0.9)},
        ),
        attention_case("step 16", 70.0, {"ours": contender(0.3, fraction_of_bound=0.65)}),
        attention_case("forward", 1.0, {"ours": contender(9.9, useful_tflop_per_s=1.0)}, positions=256),
    ],
}


def test_figures_of_attention_at_the_shape_of_the_goals():
    rows = {row.what: row for row in goals.attention_rows(ATTENTION)}
    assert {what: (row.measured, row.met) for what, row in rows.items()} == {
        "ours: forward": (480.0, True),
        "ours: backward": (250.0, False),  # 3000 GFLOP in 12 ms
        "ours: step 16, of its bound": (0.65, False),
        "ours_torch: forward": (100.0, False),
        "ours_new: forward": (600.0, True),
        "ours_new: backward": (375.0, True),
        "forward: sdpa_cudnn over ours": (1.6, True),
        "forward + backward: flex over ours": (0.9, False),
        "step 16: best other over ours": (None, None),
    }
    assert rows["ours: forward"].goal == "at least 450 TFLOP/s"


def head_case(kind, times_products):
    contenders = {"ours": contender(1.0), "products": contender(0.8, 0.8)}
    if times_products:
        contenders["ours"]["times_products"] = times_products
    size = {"rows": 32768, "width": 4096, "vocabulary": 128256 if times_products else 0}
    return {"pass": kind, **size, "goal_times_products": 1.15, "contenders": contenders}


def test_figures_of_the_head_and_of_training_steps():
    head = {"cases": [head_case("likelihood", 1.1), head_case("sample", 1.2), head_case("mix", None)]}
    assert [(row.measured, row.met) for row in goals.head_rows(head)] == [(1.1, True), (1.2, False)]
    contenders = {
        "ours": contender(100.0, fraction_of_bound=0.4, text_tokens_per_s=1e4),
        "ours_graph": contender(90.0, 0.9, fraction_of_bound=0.45, text_tokens_per_s=1.1e4),
        "step_by_step": contender(300.0, 3.0, fraction_of_bound=0.13, text_tokens_per_s=3e3),
    }
    step = {"cases": [{"model": "1B", "positions": 256, "batch": 4, "contenders": contenders}]}
    rows = list(goals.step_rows(step))
    assert [row.measured for row in rows] == [0.4, 1e4, 3.0] and {row.met for row in rows} == {None}


def test_figures_of_the_embedded_default_beside_other_seeds():
    scores = {goals.THINKING: {"accuracy": 0.98, "log_likelihood": -0.3}}
    assert [(row.measured, row.met) for row in goals.embedded_rows(scores)] == [(0.98, False), (-0.3, True)]


def test_what_was_not_measured_has_no_figure():
    rows = [*goals.rows_of({}), *goals.embedded_rows(None)]
    assert len(rows) == 8 and all(row.measured is None and row.met is None for row in rows)


def test_the_summary_holds_the_figures_of_the_results_in_its_folder(tmp_path):
    path = tmp_path / "thought_attention-a-card.json"
    code = f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(ATTENTION)!r})"
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
