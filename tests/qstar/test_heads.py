"""The heads in 16 bits: scores and rewards stay those of float32."""

from __future__ import annotations

import pytest
import tiny
import torch

from qstar import reference
from qstar.grid import Text
from qstar.learning import Objective
from qstar.talking import talk


def test_training_in_bfloat16_autocast_keeps_scores_in_float32():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Objective()(model, tiny.text(1, 8))
    assert output.loss.dtype == output.nll_talk.dtype == torch.float32
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    exact = Objective()(model, tiny.text(1, 8), thoughts=output.thoughts)
    assert float(output.nll_base) == pytest.approx(float(exact.nll_base), rel=0.05)


def test_a_float32_head_beside_16_bit_states_keeps_its_products():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    head = model.language_head()
    hidden = torch.randn(5, model.config.hidden_size).bfloat16()
    targets = torch.arange(4, 9)
    assert head.dtype == torch.float32
    expected = reference.logits(model, hidden.float()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(head.log_prob(hidden, targets), expected)
    torch.testing.assert_close(head.log_prob_sum(hidden, targets, torch.ones(5))[1], expected)


def test_rewards_in_bfloat16_autocast_are_those_of_float32():
    """A young mixing head weighs thoughts by far less than bfloat16 resolves: rewards must not drown in rounding."""
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.mul_(1e-3)
    text, grid = Text.from_inputs(tiny.text(4, 24)), model.grid(24)
    thoughts = tiny.random_thoughts(model, 4, 24)
    objective = Objective(signed=True)
    exact = objective.advantage(talk(model, text, grid, thoughts), grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective.advantage(talk(model, text, grid, thoughts), grid)
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rounded.flatten()]))[0, 1]) > 0.99
