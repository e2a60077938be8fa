"""A run that is killed at any point goes on as if it had not been."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny_runs import tiny_train
from transformers.trainer import TRAINER_STATE_NAME

from qstar.training.checkpoints import last_whole_checkpoint
from qstar.training.trainer import QuietStarTrainer


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    tiny_train(tmp_path / "cut", **options)
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"), **options)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("killed_in", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize("at_save", [1, 2])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(tmp_path, monkeypatch, killed_in, at_save):
    """Also where the checkpoint replaces one of an earlier life of the run."""
    options = dict(max_steps=5, save_strategy="steps", save_steps=2)
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    original, saves = getattr(QuietStarTrainer, killed_in), []

    def killed(trainer, *args, **kwargs):
        saves.append(trainer.state.global_step)
        if len(saves) == at_save:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "checkpoint-4" / TRAINER_STATE_NAME).write_text("{")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QuietStarTrainer, killed_in, killed)
        tiny_train(tmp_path / "cut", resume_from_checkpoint=True, **options)
    assert last_whole_checkpoint(tmp_path / "cut") == (None if at_save == 1 else tmp_path / "cut" / "checkpoint-2")
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=True, **options).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert last_whole_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-5"


def test_a_checkpoint_that_replaces_another_is_not_whole_before_its_end(tmp_path, monkeypatch):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    tiny_train(tmp_path, **options)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietStarTrainer, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **options)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
