"""The state of optimizers, schedulers and random numbers comes back from JSON and safetensors bit for bit."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import tiny
import torch
from tiny_runs import QUIET, texts, tiny_train

from qstar.training.settings import QuietStarArguments
from qstar.training.states import random_state, read_state, set_random_state, write_state
from qstar.training.trainer import QuietStarTrainer


def same(a, b) -> bool:
    """Whether both are of the same types and values, down to the bits of tensors and floats."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        as_bytes = [x.reshape(-1).contiguous().view(torch.uint8) if x.numel() else x.reshape(-1) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "state": {0: {"step": torch.tensor(3.0), "empty": torch.empty(0, 3)}, 7: {"step": 5, "none": None}},
        "numbers": [0.1, 1e-300, -0.0, math.inf, -math.inf, math.nan, 2**70, True],
        "tuples": ((1, 2), [(3,)], ()),
        "a key that is a tag": {"tensor": "0", "tuple": []},
        "keys": {(1, "a"): 1, "1": 2, 1: 3},
        "bits": [torch.tensor([math.nan, -0.0, math.inf]), torch.tensor([1.5], dtype=torch.bfloat16)],
        "views": [shared, shared, shared[1:4], shared.view(2, 3).T, torch.ones(1).expand(4)],
        "whole": [torch.arange(5, dtype=torch.uint8), torch.tensor([True, False]), torch.tensor([2**62])],
        "text": "ü\n\"'",
    }
    before = copy.deepcopy(state)
    write_state(state, tmp_path / "state")
    assert same(read_state(tmp_path / "state"), before)
    assert same(state, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


def test_what_is_read_can_be_changed_though_its_file_goes(tmp_path):
    write_state([torch.zeros(1000)], tmp_path / "state")
    (read,) = read_state(tmp_path / "state")
    (tmp_path / "state.safetensors").write_bytes(b"")
    read += 1
    assert read.sum() == 1000


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", torch.nn.Linear(1, 1), torch.Size])
def test_what_only_pickle_could_hold_is_refused(value, tmp_path):
    with pytest.raises(TypeError, match=r"optimizer\['state'\]\[0\] is a .*, which no checkpoint can hold"):
        write_state({"state": [value]}, tmp_path / "optimizer")


def test_random_numbers_go_on_where_they_were(tmp_path):
    def drawn():
        return random.random(), random.gauss(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()

    before = random_state(torch.device("cpu"))
    try:
        random.seed(3)
        np.random.seed(4)
        torch.manual_seed(5)
        drawn()  # which leaves the second number of a pair behind, in Python's and in numpy's
        write_state(random_state(torch.device("cpu")), tmp_path / "random")
        expected = drawn()
        set_random_state(read_state(tmp_path / "random"), torch.device("cpu"))
        assert drawn() == expected
    finally:
        set_random_state(before, torch.device("cpu"))


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop")
SCHEDULERS = ("cosine", "constant_with_warmup", "polynomial", "reduce_lr_on_plateau", "inverse_sqrt")
CASES = [(optimizer, "linear") for optimizer in OPTIMIZERS] + [("adamw_torch", each) for each in SCHEDULERS]


@pytest.mark.parametrize(("optim", "schedule"), CASES)
def test_a_resumed_run_has_the_state_of_one_that_was_not_interrupted(optim, schedule, tmp_path, monkeypatch):
    """Of its optimizer, its scheduler and every random number, and so the same weights."""
    ends, load, compute = [], QuietStarTrainer._load_optimizer_and_scheduler, QuietStarTrainer.compute_loss

    def watched(trainer, checkpoint):
        ends.append(trainer)
        load(trainer, checkpoint)

    def drawing(trainer, *args, **kwargs):
        random.random(), np.random.random(), torch.rand(1)
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "_load_optimizer_and_scheduler", watched)
    monkeypatch.setattr(QuietStarTrainer, "compute_loss", drawing)
    options = dict(max_steps=3, save_strategy="steps", save_steps=1, optim=optim, lr_scheduler_type=schedule)
    options |= dict(warmup_steps=2)
    if schedule == "reduce_lr_on_plateau":
        options |= dict(eval_strategy="steps", eval_steps=1, eval_dataset=texts(4), metric_for_best_model="eval_loss")
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = tiny_train(tmp_path / "resumed", resume_from_checkpoint=checkpoint, **options).model.state_dict()
    (trainer,) = ends
    last, again = (tmp_path / name / "checkpoint-3" for name in ("whole", "resumed"))
    assert same(read_state(last / "optimizer"), trainer.optimizer.state_dict())
    assert same(read_state(last / "scheduler"), trainer.lr_scheduler.state_dict())
    assert same(read_state(last / "random_state_0"), read_state(again / "random_state_0"))
    for name, tensor in whole.items():
        assert same(resumed[name], tensor), name


def test_the_scaler_of_float16_goes_on_where_it_was(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    trainer = QuietStarTrainer(model, QuietStarArguments(str(tmp_path), **QUIET))
    trainer._save_scaler(str(tmp_path))
    assert not list(tmp_path.iterdir())  # a run that has none
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=3)
    expected = trainer.accelerator.scaler.state_dict()
    trainer._save_scaler(str(tmp_path))
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.state_dict() == expected
