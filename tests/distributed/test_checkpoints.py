"""A run of two processes has one folder and checkpoints that both write into, and goes on from them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from on_processes import free_port, meet, on_every_rank
from tiny_runs import texts

from qstar.commands.main import main
from qstar.training.checkpoints import fault
from qstar.training.folders import LOCK_FILE

FLAGS = (
    "--model model --dataset texts.jsonl --seq_length 12 --thought_tokens 2 --ahead_tokens 2 --batch_size 2 "
    "--sample_steps 0 --use_cpu --warmup_steps 0 --learning_rate 1e-3 --logging_steps 1 --save_strategy steps"
)


@pytest.fixture
def begin(tmp_path):
    """Starts ``qstar train`` in two processes, in ``tmp_path`` and with further flags."""
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    texts().to_json(tmp_path / "texts.jsonl")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qstar"]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}

    def start(flags: str) -> subprocess.Popen:
        command = [*launch, "train", *FLAGS.split(), *flags.split()]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def finished(run: subprocess.Popen) -> str:
    """What a run writes to the error stream, when it has ended well."""
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    return errors


def train(rank: int, port: int, folder: Path, flags: str) -> None:
    """One process of a run, without the launcher; what it writes to the error stream is kept."""
    meet(rank, port)
    os.chdir(folder)
    with open(f"errors-{rank}.txt", "wb") as errors:
        os.dup2(errors.fileno(), sys.stderr.fileno())
    sys.exit(main(["train", *FLAGS.split(), *flags.split()]))


def weights(run: Path) -> list[str]:
    files = ("model.safetensors", "qstar/mixing_head.safetensors")
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_go_on_from_the_last_whole_checkpoint(begin, tmp_path):
    finished(begin("--output_dir whole --max_steps 6 --save_steps 2"))
    for step in (2, 4, 6):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert fault(checkpoint) is None
        assert all((checkpoint / f"random_state_{rank}.json").is_file() for rank in range(2))
    for step in (2, 4):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    (tmp_path / "cut" / "checkpoint-4" / "random_state_1.json").unlink()
    on_every_rank(train, free_port(), tmp_path, "--output_dir cut --max_steps 6 --save_steps 2 --resume")
    errors = (tmp_path / "errors-0.txt").read_text()
    assert "checkpoint-4 is left out: random_state_1.json is missing" in errors
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_stop_after_the_same_step(begin, tmp_path):
    """Though one of them alone is told to."""
    with begin("--output_dir run --max_steps 100000") as run:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 200
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        first = int((tmp_path / "run" / LOCK_FILE).read_text().split()[1])
        os.kill(first, signal.SIGTERM)
        _, errors = run.communicate(timeout=200)
    assert "stopped by SIGTERM: run/checkpoint-" in errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert fault(checkpoint) is None
    assert all((checkpoint / f"random_state_{rank}.json").is_file() for rank in range(2))
    step = int(checkpoint.name.split("-")[1])
    on_every_rank(train, free_port(), tmp_path, f"--output_dir run --max_steps {step + 2} --resume")
    assert fault(tmp_path / "run" / f"checkpoint-{step + 2}") is None
