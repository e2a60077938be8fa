"""A run that is told to stop, or is killed, goes on as if it had not been."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from tiny_runs import QUIET, texts, tiny_train

from qstar.training.checkpoints import fault, last_whole_checkpoint
from qstar.training.fit import SETTINGS_FILE
from qstar.training.folders import LOCK_FILE
from qstar.training.trainer import QuietStarTrainer

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
OPTIONS = dict(max_steps=5, save_strategy="steps", save_steps=100, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Python's own answer to Ctrl-C, which is missing where the tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def told_in_step(monkeypatch, number: int, steps: list[int], at: int, times: int = 1) -> None:
    """Have this process send itself the signal while it computes step ``at``; ``steps`` gathers those computed."""
    compute = QuietStarTrainer.compute_loss

    def told(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        if steps[-1] == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "compute_loss", told)


@SIGNALS
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(number, tmp_path, monkeypatch, caplog):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    whole = tiny_train(tmp_path / "whole", **OPTIONS).model.state_dict()
    steps: list[int] = []
    with monkeypatch.context() as patch:
        told_in_step(patch, number, steps, at=2)
        with pytest.raises(SystemExit) as left:
            tiny_train(tmp_path / "cut", **OPTIONS)
    assert left.value.code == 128 + number
    assert steps == [0, 1, 2]
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    assert f"stopped by {number.name}: {checkpoint} goes on from here" in caplog.text
    assert last_whole_checkpoint(tmp_path / "cut") == checkpoint
    assert not (tmp_path / "cut" / SETTINGS_FILE).exists()
    assert not (tmp_path / "cut" / LOCK_FILE).exists()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=True, **OPTIONS).model.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path, monkeypatch):
    steps: list[int] = []
    told_in_step(monkeypatch, signal.SIGINT, steps, at=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, **OPTIONS)
    assert steps == [0, 1, 2]
    assert last_whole_checkpoint(tmp_path) is None


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script; the fixture puts it back
    steps: list[int] = []
    told_in_step(monkeypatch, signal.SIGINT, steps, at=2)
    tiny_train(tmp_path / "run", **OPTIONS)
    assert steps == [0, 1, 2, 3, 4]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_ctrl_c_ends_a_run_without_checkpoints_at_once(tmp_path, monkeypatch):
    told_in_step(monkeypatch, signal.SIGINT, [], at=2)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, **(OPTIONS | dict(save_strategy="no")))
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
@SIGNALS
def test_the_command_leaves_with_the_code_of_the_signal(number, tmp_path):
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    texts().to_json(tmp_path / "texts.jsonl")
    flags = "--seq_length 12 --thought_tokens 2 --ahead_tokens 2 --batch_size 2 --sample_steps 0 --max_steps 100000"
    command = f"-m qstar train --model model --dataset texts.jsonl --output_dir run {flags} --logging_steps 1".split()
    paths = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as run:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        run.send_signal(number)
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + number, errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
    assert f"stopped by {number.name}: run/{checkpoint.name} goes on from here" in errors


STEPS = 30
KILLED = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=2, learning_rate=1e-2)


def train_on(folder: str) -> None:
    """A process of its own, that may be killed."""
    torch.set_num_threads(1)
    tiny_train(Path(folder), resume_from_checkpoint=True, **(QUIET | KILLED))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_that_is_killed_at_random_ends_with_the_same_weights(seed, tmp_path):
    """By SIGKILL, until it has come to its end: while it computes, and while it writes, renames and removes."""
    whole = tiny_train(tmp_path / "whole", **KILLED).model.state_dict()
    context, rng, kills = multiprocessing.get_context("forkserver"), random.Random(seed), 0
    context.set_forkserver_preload(["qstar.training.run", "tiny_runs"])
    folder = tmp_path / "cut"
    while not (folder / SETTINGS_FILE).exists():
        process = context.Process(target=train_on, args=(str(folder),))
        process.start()
        begun = {path.name for path in folder.glob("*checkpoint-*")}
        while process.is_alive() and {path.name for path in folder.glob("*checkpoint-*")} <= begun:
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.4))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert kills >= 3
    resumed = tiny_train(folder, resume_from_checkpoint=True, **KILLED).model.state_dict()
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
