"""Training with pause tokens: Quiet-STaR's likelihood, every thought the same and none of them sampled."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_runs import QUIET, unequal_rows

from qstar import Objective, QuietStarArguments, QuietStarTrainer, reference
from qstar.ancestors.pause import PauseTrainer, pause_loss, pauses

OPTIONS = QUIET | dict(max_steps=2, warmup_steps=0, learning_rate=1e-2, report_to="none", use_cpu=True)


def test_the_loss_is_that_of_plain_passes_with_the_same_thought_everywhere():
    """K times the token that opens it, by the specification in plain loops; exactly, since GPT-2 computes in float64"""
    model = tiny.thinking_model("gpt2", thought_tokens=3, ahead_tokens=2, rationales=2, dtype=torch.float64)
    text = tiny.text(1, 9)
    thoughts = torch.full((9, 1, 3), model.qstar.start_token_id)
    ours = pause_loss(model, input_ids=text)
    ours.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.set_attn_implementation("eager")
    expected = reference.objective(model, text[0], thoughts, policy_weight=0.0, reinforce_temperature=1.0)
    loss = (expected["nll_base"] + expected["nll_talk"]) / 2
    loss.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-12)
    assert found["qstar_start"].abs().sum() > 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-9, atol=1e-12)


def test_pauses_are_the_token_that_opens_a_thought():
    model = tiny.thinking_model(thought_tokens=3)
    assert pauses(model, 2).tolist() == [[model.qstar.start_token_id] * 3] * 2


def test_the_loss_of_an_update_does_not_depend_on_how_its_rows_are_split(tmp_path):
    """Rows of very different length in one batch, or two at a time."""
    weights = []
    for split in (
        dict(per_device_train_batch_size=8),
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4),
    ):
        model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
        args = QuietStarArguments(str(tmp_path / "run"), optim="sgd", **OPTIONS | split)
        PauseTrainer(model, args, train_dataset=unequal_rows()).train()
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_nothing_is_sampled_and_nothing_rewarded(tmp_path, monkeypatch):
    """Where Quiet-STaR's own Trainer would."""
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    monkeypatch.setattr(Objective, "__call__", lambda *_, **__: pytest.fail("thoughts are sampled"))
    args = QuietStarArguments(str(tmp_path / "run"), **OPTIONS)
    assert PauseTrainer(model, args, train_dataset=unequal_rows()).train().global_step == 2
    with pytest.raises(pytest.fail.Exception, match="thoughts are sampled"):
        QuietStarTrainer(model, args, train_dataset=unequal_rows()).train()
