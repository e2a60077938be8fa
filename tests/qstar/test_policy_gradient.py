"""REINFORCE against the exact gradient, found by enumerating every thought of a tiny vocabulary."""

from __future__ import annotations

from itertools import product

import pytest
import tiny
import torch
from torch import Tensor

from qstar import reference
from qstar.grid import Text
from qstar.learning import Objective
from qstar.talking import talk

pytestmark = pytest.mark.slow

LETTERS, LENGTH, POSITIONS = 2, 2, 4
CHUNKS, COPIES = 40, 64


def model_of_few_letters(rationales: int):
    """A model that can say only ``LETTERS`` letters: the bias of its head rules out all other tokens."""
    model = tiny.thinking_model(
        "gpt2", dtype=torch.float64, thought_tokens=LENGTH, ahead_tokens=1, rationales=rationales
    )
    head = torch.nn.Linear(32, model.lm_head.weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
        head.bias.fill_(-200.0)
        head.bias[4 : 4 + LETTERS] = 0
    model.lm_head = head
    model.config.tie_word_embeddings = False
    return model


def parameters(model) -> list[Tensor]:
    """Parameters that the policy reads."""
    return [model.qstar_start, model.transformer.h[0].attn.c_attn.weight, model.transformer.h[1].mlp.c_fc.weight]


def flat_gradient(model, loss: Tensor) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters(model))])


def exact_gradient(model, tokens: Tensor) -> Tensor:
    """The gradient of the expected score, mean over the positions: every thought by its probability."""
    thoughts = torch.tensor(list(product(range(4, 4 + LETTERS), repeat=LENGTH)))
    copies = tokens.expand(len(thoughts), -1)
    grid = model.grid(POSITIONS, rationales=1)
    placed = thoughts[:, None, None].expand(-1, POSITIONS, 1, -1)
    spoken = talk(model, Text.from_inputs(copies), grid, placed)
    log_policy = reference.logits(model, spoken.policy).log_softmax(-1).gather(-1, placed[..., None])[..., 0].sum(-1)
    probability = log_policy.exp()[:, : POSITIONS - 1, 0]
    score = spoken.log_talk.detach()[:, : POSITIONS - 1, 0, 0]
    torch.testing.assert_close(probability.sum(0), torch.ones(POSITIONS - 1, dtype=torch.float64))
    return flat_gradient(model, -(probability * score).sum(0).mean())


@pytest.mark.parametrize(
    ("rationales", "baseline", "scale"), [(2, "mean", 0.5), (2, "leave_one_out", 1.0), (1, "base", 1.0)]
)
def test_policy_gradient_is_that_of_the_expected_score(rationales, baseline, scale):
    model = model_of_few_letters(rationales)
    tokens = tiny.text(1, POSITIONS) % LETTERS + 4
    exact = exact_gradient(model, tokens)
    estimates = []
    for seed in range(CHUNKS):
        objective = Objective(reinforce_temperature=1.0, baseline=baseline, signed=True, seed=seed)
        output = objective(model, tokens.expand(COPIES, -1))
        estimates.append(LENGTH * flat_gradient(model, output.policy_loss))
    estimates = torch.stack(estimates)
    along = estimates @ exact / (exact @ exact)
    error = along.std() / CHUNKS**0.5
    assert error < 0.1, "too noisy to tell"
    assert abs(along.mean() - scale) < 4 * error

    across = estimates - along[:, None] * exact
    direction = torch.randn(exact.numel(), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    projected = across @ direction
    assert abs(projected.mean()) < 4 * projected.std() / CHUNKS**0.5
