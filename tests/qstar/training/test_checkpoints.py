"""A run that is killed at any point goes on as if it had not been."""

from __future__ import annotations

import shutil

import pytest
import tiny
import torch
from tiny_runs import QUIET, records, texts, tiny_train
from transformers.trainer import TRAINER_STATE_NAME

from qstar import load
from qstar.training.checkpoints import last_whole_checkpoint
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer


@pytest.fixture
def steps(monkeypatch):
    """The steps that were computed, in order."""
    taken, compute = [], QuietStarTrainer.compute_loss

    def watched(trainer, *args, **kwargs):
        taken.append(trainer.state.global_step)
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "compute_loss", watched)
    return taken


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path, steps):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    tiny_train(tmp_path / "cut", **options)
    steps.clear()
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"), **options)
    assert steps == [2, 3]
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("killed_in", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize("at_save", [1, 2])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(tmp_path, monkeypatch, steps, killed_in, at_save):
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
    steps.clear()
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=True, **options).model.state_dict()
    assert steps == list(range(0 if at_save == 1 else 2, 5))
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


def test_the_model_that_is_kept_as_the_best_is_the_best(tmp_path):
    """With a learning rate that makes things worse from evaluation to evaluation, that is the first one."""
    options = dict(max_steps=3, learning_rate=0.3, save_strategy="steps", save_steps=1, eval_strategy="steps")
    options |= dict(eval_steps=1, eval_dataset=texts(4), metric_for_best_model="eval_nll_talk")
    result = tiny_train(tmp_path, load_best_model_at_end=True, save_total_limit=3, **options)
    found = {r["step"]: r["eval_nll_talk"] for r in records(tmp_path) if "eval_nll_talk" in r}
    best = min(found, key=found.get)
    assert max(found.values()) > found[best]
    kept = load(tmp_path / f"checkpoint-{best}")[0].state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_a_finished_run_that_kept_the_best_is_taken_up_with_the_best(tmp_path):
    """Also where its folder has moved. A metric that gets worse with every step makes the first checkpoint the best."""
    options = dict(max_steps=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    options |= dict(eval_dataset=texts(4), metric_for_best_model="eval_epoch", greater_is_better=False)

    class Epochs(QuietStarTrainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_epoch": self.state.epoch}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qstar.training.fit.QuietStarTrainer", Epochs)
        first = tiny_train(tmp_path / "run", load_best_model_at_end=True, **options).model.state_dict()
        moved = (tmp_path / "run").rename(tmp_path / "moved")
        again = tiny_train(moved, load_best_model_at_end=True, resume_from_checkpoint=True, **options)
    kept, last = (load(moved / f"checkpoint-{step}")[0].state_dict() for step in (1, 2))
    assert not all(torch.equal(kept[name], last[name]) for name in kept)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name
        assert torch.equal(first[name], kept[name]), name


@pytest.mark.parametrize("what", ["the loss", "the gradient of qstar_mixing_head.output.weight"])
def test_a_run_that_is_not_finite_stops_before_the_step(what, tmp_path):
    """The checkpoint before it is whole, the weights are those of it, and the message names what went wrong."""
    steps = []

    class Spoiled(QuietStarTrainer):
        def compute_loss(self, model, *args, **kwargs):
            loss = super().compute_loss(model, *args, **kwargs)
            steps.append(self.state.global_step)
            if len(steps) == 3 and what == "the loss":
                return loss * float("nan")
            if len(steps) == 3:
                model.qstar_mixing_head.output.weight.register_hook(lambda gradient: gradient * float("inf"))
            return loss

    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    args = QuietStarArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, **(QUIET | dict(save_strategy="steps", save_steps=2))
    )
    rows = [{"input_ids": tiny.text(1, 12, seed)[0].tolist(), "position_ids": list(range(12))} for seed in range(8)]
    with pytest.raises(FloatingPointError, match=f"{what} is not finite in step 3") as stopped:
        Spoiled(model, args, train_dataset=rows, processing_class=tiny.tokenizer()).train()
    assert "checkpoints are as they were" in str(stopped.value)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    kept = load(tmp_path / "checkpoint-2")[0].state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[: len(kept[name])], kept[name]) or name.endswith("embed_tokens.weight"), name


def test_a_folder_with_weights_that_are_not_finite_is_refused(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model whose model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        load(tmp_path)
