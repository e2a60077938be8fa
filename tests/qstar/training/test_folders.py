"""No two runs are in one folder at one time."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from tiny_runs import tiny_train

from qstar import train_embedded
from qstar.embedded import run as embedded
from qstar.training.folders import LOCK_FILE, run_folder

OPTIONS = dict(max_steps=2, save_strategy="steps", save_steps=1)


@pytest.mark.parametrize("resume", [None, True])
def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(resume, tmp_path):
    with run_folder(tmp_path, None):
        with pytest.raises(BlockingIOError, match=rf"output_dir is '{tmp_path}', but another run .* {os.getpid()} on "):
            tiny_train(tmp_path, resume_from_checkpoint=resume, **OPTIONS)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert tiny_train(tmp_path, resume_from_checkpoint=resume, **OPTIONS).metrics["step"] == 2
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_run_that_goes_on_with_a_given_checkpoint_has_its_folder_alone(tmp_path):
    tiny_train(tmp_path, **OPTIONS)
    with run_folder(tmp_path, True), pytest.raises(BlockingIOError, match="another run is in it"):
        tiny_train(None, resume_from_checkpoint=tmp_path / "checkpoint-1", **OPTIONS)


def test_the_embedded_run_has_its_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "pretrained_model", lambda *_: pytest.fail("it has begun"))
    with run_folder(tmp_path, None), pytest.raises(BlockingIOError, match="another run is in it"):
        train_embedded(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_was_killed_has_no_folder(tmp_path):
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with run_folder(tmp_path, None):
            os.write(told, b".")
            signal.pause()
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"."
        with pytest.raises(BlockingIOError, match=f"process {child} on "), run_folder(tmp_path, None):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (tmp_path / LOCK_FILE).exists()
    with run_folder(tmp_path, None) as folder:
        assert folder == tmp_path


def test_default_runs_that_begin_together_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    together = Barrier(8, timeout=20)

    def begin(_: int) -> Path:
        together.wait()
        with run_folder(None, None) as folder:
            (folder / "model").touch()
            together.wait()
        return folder

    with ThreadPoolExecutor(8) as pool:
        folders = sorted(map(str, pool.map(begin, range(8))))
    assert folders == ["runs/quiet-star", *(f"runs/quiet-star-{number}" for number in range(2, 9))]
    assert all([path.name for path in Path(folder).iterdir()] == ["model"] for folder in folders)


def test_a_run_that_fails_before_it_writes_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="seq_length is 1"):
            tiny_train(None, seq_length=1)
    assert not list(Path("runs").iterdir())
    assert str(tiny_train(None, max_steps=1).folder) == "runs/quiet-star"


def test_several_processes_need_one_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="output_dir is missing: each of several processes would find another one"):
        tiny_train(None)
    with run_folder("run", None):
        monkeypatch.setenv("RANK", "1")
        with run_folder("run", None) as folder:  # of the second process of the same run
            assert folder == Path("run")
