"""Distillation against plain passes, and what must hold of it."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from storage_watch import StorageWatch

from qstar import heads, reference
from qstar.distilling import Distillation
from qstar.grid import Text


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: torch.Tensor, other: torch.Tensor, floor: float = 0.1) -> float:
    return float((ours - other).detach().norm() / other.detach().norm().clamp(min=floor))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize(("rationales", "likelihood_weight"), [(1, 0.0), (3, 0.7)])
def test_the_divergence_is_that_of_one_plain_pass_for_every_thought(family, rationales, likelihood_weight):
    """Value and gradients; whatever m is, since the next token alone is predicted."""
    exact = family == "gpt2"
    dtype, tolerance = (torch.float64, 1e-12) if exact else (torch.float32, 1e-5)
    model = tiny.thinking_model(family, dtype=dtype, thought_tokens=2, ahead_tokens=3, rationales=rationales)
    tokens, thoughts = tiny.text(1, 6), tiny.random_thoughts(model, 1, 6)
    ours = Distillation(likelihood_weight=likelihood_weight)(model, tokens, thoughts=thoughts)
    our_gradients = gradients(model, ours.loss)
    model.set_attn_implementation("eager")
    plain = reference.distillation(model, tokens[0], thoughts[0], likelihood_weight=likelihood_weight)
    plain_gradients = gradients(model, plain["loss"])
    assert plain["divergence"].item() > 0.01
    for name, value in plain.items():
        assert relative(getattr(ours, name), value) <= tolerance, name
    for name, gradient in plain_gradients.items():
        assert relative(our_gradients[name], gradient) <= tolerance, name


@pytest.mark.parametrize("settings", [dict(sigmoid=True), dict(mixing_head=False, mixing=False), dict(pauses=True)])
def test_the_teacher_mixes_as_the_model_does(settings):
    model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=2, ahead_tokens=1, **settings)
    tokens = tiny.text(1, 6)
    output = Distillation(seed=3)(model, tokens)
    model.set_attn_implementation("eager")
    plain = reference.distillation(model, tokens[0], output.thoughts[0], likelihood_weight=1.0)
    assert relative(output.loss, plain["loss"]) <= 1e-12 and plain["divergence"].item() > 0.01


@pytest.mark.parametrize("settings", [dict(max_grid_tokens=30), dict(checkpointing=True)], ids=["parts", "again"])
def test_what_saves_memory_changes_nothing(settings):
    found = []
    for changed in ({}, settings):
        model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=3, ahead_tokens=2)
        if changed.pop("checkpointing", False):
            tiny.checkpoint_layers(model, use_reentrant=False)
        output = Distillation(seed=5, **changed)(model.train(), tiny.text(2, 9))
        found.append((output, gradients(model, output.loss)))
    (whole, whole_gradients), (other, other_gradients) = found
    assert torch.equal(whole.thoughts, other.thoughts)
    assert relative(other.loss, whole.loss) <= 1e-12
    for name, gradient in whole_gradients.items():
        assert relative(other_gradients[name], gradient) <= 1e-12, name


def test_at_some_positions_the_divergence_is_that_of_the_loops_there():
    model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=2, ahead_tokens=2, rationales=2)
    tokens = tiny.text(1, 9)
    output = Distillation(seed=4, positions_per_row=3)(model, tokens)
    [positions] = output.positions.tolist()
    assert len(positions) == 3 and positions[-1] <= 6  # where two tokens follow
    our_gradients = gradients(model, output.loss)
    given = Distillation()(model, tokens, thoughts=output.thoughts, positions=output.positions)
    assert torch.equal(given.loss, output.loss)
    model.set_attn_implementation("eager")
    plain = reference.distillation(model, tokens[0], output.thoughts[0], likelihood_weight=1.0, positions=positions)
    for name, value in plain.items():
        assert relative(getattr(output, name), value) <= 1e-12, name
    for name, gradient in gradients(model, plain["loss"]).items():
        assert relative(our_gradients[name], gradient) <= 1e-12, name


def test_a_thought_that_changes_nothing_teaches_nothing():
    model = tiny.thinking_model("gpt2", dtype=torch.float64, mixing=False, thought_tokens=2)
    output = Distillation(likelihood_weight=0.0)(model, tiny.text(2, 7))
    assert abs(output.loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(model, output.loss).values())


def test_padding_and_labels_that_do_not_count_are_left_out():
    """The mean is over what is to be predicted, and parts of a batch add up to it."""
    model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=2)
    tokens, thoughts = tiny.text(2, 7), tiny.random_thoughts(model, 2, 7)
    mask, labels = torch.ones_like(tokens), tokens.clone()
    mask[1, 4:] = 0
    labels[0, 3:5] = -100
    batch = dict(attention_mask=mask, labels=labels)
    whole = Distillation()(model, tokens, thoughts=thoughts, **batch)
    counts = Text.from_inputs(tokens, mask, labels).counts(model.grid(7))
    parts = [
        Distillation(counts=counts)(
            model, tokens[i : i + 1], thoughts=thoughts[i : i + 1], **{n: x[i : i + 1] for n, x in batch.items()}
        )
        for i in range(2)
    ]
    assert counts.text == 4 + 3
    for name in ("loss", "nll_base", "nll_talk", "mixing_weight"):
        assert relative(sum(getattr(part, name) for part in parts), getattr(whole, name)) <= 1e-12, name
    model.set_attn_implementation("eager")
    alone = reference.distillation(model, tokens[1, :4], thoughts[1, :4], likelihood_weight=1.0)
    assert relative(parts[1].loss * 7 / 3, alone["loss"]) <= 1e-12


def test_no_more_logits_are_held_than_of_some_rows(monkeypatch):
    """By chunks of two rows the same value and gradients, and nothing as large as the logits of all rows."""
    model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=2, changes=dict(vocab_size=5000))
    tokens = tiny.text(2, 20)
    thoughts = tiny.random_thoughts(model, 2, 20)
    found = []
    for rows in (1000, 2):
        monkeypatch.setattr(heads, "CHUNK_ELEMENTS", rows * 5002 * 3)
        output = Distillation(likelihood_weight=0.0)(model, tokens, thoughts=thoughts)
        found.append((output.loss, gradients(model, output.loss)))
    (whole, whole_gradients), (parts, part_gradients) = found
    assert relative(parts, whole) <= 1e-12
    for name, gradient in whole_gradients.items():
        assert relative(part_gradients[name], gradient) <= 1e-12, name
    head = model.language_head()
    hidden = torch.randn(400, 32, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(400, 2, 32, dtype=torch.float64)
    weights = torch.full((400,), 0.01, dtype=torch.float64)
    with StorageWatch(at_least=1) as watch:
        head.divergence(teacher, hidden, weights).backward()
    assert watch.largest == head.weight.nbytes < 400 * 5002 * 8 / 10


def test_what_is_learned_is_the_prediction_without_a_thought():
    """Of the same thoughts about the same text, it comes nearer to that with them at every step."""
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    tokens = tiny.text(4, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)
    found = []
    for _ in range(5):
        output = Distillation(likelihood_weight=0.0)(model, tokens, thoughts=tiny.random_thoughts(model, 4, 9))
        found.append(output.divergence.item())
        optimizer.zero_grad()
        output.loss.backward()
        assert model.qstar_mixing_head.output.weight.grad is None
        optimizer.step()
    assert all(later < before for before, later in itertools.pairwise(found))
