"""Where memory is out, the error says which setting to lower and to what."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from tiny_runs import QUIET, texts, tiny_train

from qstar.commands import train as command
from qstar.commands.main import main
from qstar.evaluation import held_out
from qstar.grid import ThoughtGrid
from qstar.training import trainer as trainer_module
from qstar.training.memory import OutOfMemory, evaluation_advice, explained, inspection_advice, training_advice
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

GRID = ThoughtGrid(256, rationales=2, thought_tokens=8, ahead_tokens=4)  # 27 tokens at each position
OF_A_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
OF_A_CPU = RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 17179869184 bytes.")


def arguments(**settings) -> QuietStarArguments:
    return QuietStarArguments("unused", use_cpu=True, **(QUIET | dict(seq_length=256) | settings))


def fails(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        (
            dict(per_device_train_batch_size=8, max_grid_tokens=0),
            "per_device_train_batch_size=4 with gradient_accumulation_steps=2 (now 8 and 1); "
            "gradient_checkpointing=True; max_grid_tokens=27648 (a pass holds 55296 tokens of text and thoughts).",
        ),
        (
            dict(per_device_train_batch_size=3, gradient_accumulation_steps=4, gradient_checkpointing=True),
            "per_device_train_batch_size=1 with gradient_accumulation_steps=12 (now 3 and 4); "
            "max_grid_tokens=2048 (a pass holds 4096 tokens of text and thoughts).",
        ),
        (
            dict(per_device_train_batch_size=1, gradient_checkpointing=True),
            "max_grid_tokens=2048 (a pass holds 4096 tokens of text and thoughts).",
        ),
    ],
)
def test_what_makes_the_same_updates_is_told_first(settings, same):
    args = arguments(**settings)
    assert training_advice(args, GRID, args.objective().max_grid_tokens) == (
        f"a training step does not fit in memory. These make the same updates: {same} "
        "These make others: bf16=True; rationales=1 (now 2); seq_length=128 (now 256)."
    )


@pytest.mark.parametrize(("rows", "steps", "fewer", "more"), [(2, 1, 1, 2), (5, 1, 1, 5), (6, 2, 3, 4), (9, 1, 3, 3)])
def test_an_update_keeps_its_number_of_rows(rows, steps, fewer, more):
    settings = dict(per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
    expected = f"per_device_train_batch_size={fewer} with gradient_accumulation_steps={more} (now {rows} and {steps})"
    assert expected in training_advice(arguments(**settings), GRID, None)


def test_what_cannot_be_lowered_is_not_told():
    least = ThoughtGrid(2, rationales=1, thought_tokens=1, ahead_tokens=1)
    settings = dict(per_device_train_batch_size=1, gradient_checkpointing=True, bf16=True, seq_length=2)
    assert training_advice(arguments(**settings), least, None) == (
        "a training step does not fit in memory. These make the same updates: max_grid_tokens=4 (a pass holds 8 tokens "
        "of text and thoughts)."
    )


def test_an_evaluation_has_a_setting_of_its_own():
    assert evaluation_advice(arguments(per_device_eval_batch_size=8)) == (
        "the evaluation does not fit in memory: try per_device_eval_batch_size=4 (now 8)"
    )
    assert evaluation_advice(arguments(per_device_eval_batch_size=1)) == (
        "the evaluation does not fit in memory, one row at a time: try a seq_length below 256"
    )


def test_an_inspection_has_settings_of_its_own():
    assert inspection_advice(4096) == (
        "an inspection does not fit in memory: try a lower max_grid_tokens (now 4096), a lower seq_length or fewer "
        "rationales; inspect_steps=0 leaves it out"
    )
    assert "(now all of a row)" in inspection_advice(None)


def test_the_advice_halves_the_memory_of_a_step_and_makes_the_same_updates(tmp_path):
    """By its own words, applied as settings."""
    options = dict(batch_size=4, max_steps=2, max_grad_norm=0.0, optim="sgd", learning_rate=0.1)
    options |= dict(preset="paper", policy_weight=1.0)  # signed rewards cancel: little but rounding is left
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    advice = training_advice(arguments(per_device_train_batch_size=4), GRID, None)
    rows, steps = map(int, re.search(r"batch_size=(\d+) with gradient_accumulation_steps=(\d+)", advice).groups())
    assert (rows, steps) == (2, 2)
    split = tiny_train(tmp_path / "split", **options | dict(batch_size=rows, gradient_accumulation_steps=steps))
    for name, weight in split.model.state_dict().items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("error", [OF_A_GPU, OF_A_CPU], ids=["gpu", "cpu"])
def test_a_training_step_that_does_not_fit_says_what_to_lower(error, tmp_path, monkeypatch):
    monkeypatch.setattr(QuietStarTrainer, "compute_loss", fails(error))
    with pytest.raises(torch.OutOfMemoryError) as out:
        tiny_train(tmp_path / "run")
    assert str(out.value).startswith("a training step does not fit in memory. These make the same updates: per_device")
    assert "max_grid_tokens=132 (a pass holds 264 tokens" in str(out.value)  # 2 rows of 12 positions of 11 tokens
    assert str(out.value).endswith(str(error)) and out.value.__cause__ is error


@pytest.mark.parametrize("error", [OF_A_GPU, OF_A_CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_an_evaluation_that_does_not_fit_says_so_also_in_the_midst_of_training(error, strategy, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "think", fails(error))
    options = dict(eval_strategy=strategy, **(dict(eval_steps=1) if strategy == "steps" else {}))
    with pytest.raises(OutOfMemory) as out:
        tiny_train(tmp_path / "run", eval_dataset=texts(4), **options)
    said = "the evaluation does not fit in memory: try per_device_eval_batch_size=4 (now 8)\n"
    assert str(out.value) == said + str(error)


def test_what_a_cpu_says_by_itself_is_known():
    said = r"lower it\n.*you tried to allocate 1125899906842624 bytes"
    with pytest.raises(OutOfMemory, match=said), explained(lambda: "lower it"):
        torch.empty(2**50, dtype=torch.uint8)


def test_other_errors_are_left_alone():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as same, explained(lambda: "lower it"):
        raise error
    assert same.value is error


def test_the_command_says_it_in_a_word(monkeypatch, capsys):
    monkeypatch.setattr(command, "train_embedded", fails(OutOfMemory("lower it")))
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "qstar train: lower it\n"


def test_a_batch_size_that_is_looked_for_is_found_by_trying(tmp_path, monkeypatch):
    """auto_find_batch_size of transformers goes on seeing the errors."""
    compute, tried = QuietStarTrainer.compute_loss, []

    def too_large(trainer, model, inputs, *args, **kwargs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer_module.QuietStarTrainer, "compute_loss", too_large)
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    rows = [{"input_ids": tiny.text(1, 12, seed)[0].tolist(), "position_ids": list(range(12))} for seed in range(8)]
    args = QuietStarArguments(
        str(tmp_path), auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=1, **QUIET
    )
    QuietStarTrainer(model, args, train_dataset=rows).train()
    assert tried[0] == 8 and tried[-1] <= 2
