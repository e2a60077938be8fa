"""A grid read in one pass, step by step and from plain passes: the same states, or a refusal."""

from __future__ import annotations

import pytest
import tiny
import torch

from qstar import reference
from qstar.grid import Text
from qstar.talking import read_grid
from qstar.thinking import advance, read_on, read_text

FAMILIES = sorted(tiny.FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_equals_packed(family):
    model = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=2)
    tokens = tiny.text(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    text, grid = Text.from_inputs(tokens, mask), model.grid(7)
    thoughts = tiny.random_thoughts(model, 2, 7)
    packed = read_grid(model, text, grid, thoughts).unflatten(1, (7, grid.slots))
    rows = grid.tokens(tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    rows = rows.unflatten(1, (7, grid.slots))[:, :, 1:].unflatten(2, (grid.rationales, -1))
    reading = read_text(model, text, grid)
    torch.testing.assert_close(reading.hidden[mask.bool()], packed[:, :, 0][mask.bool()], rtol=1e-5, atol=1e-5)
    rationales = packed[:, :, 1:].unflatten(2, (grid.rationales, -1))
    for step in range(grid.rationale_length):
        states = advance(model, reading, step, rows[..., step])
        torch.testing.assert_close(states[mask.bool()], rationales[..., step, :][mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_thinking_at_the_last_positions_only():
    model = tiny.thinking_model("mistral", thought_tokens=2, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(2, 7)), model.grid(7)
    tokens = tiny.random_thoughts(model, 2, 7)[..., 0]
    whole = advance(model, read_text(model, text, grid), 0, tokens)
    part = advance(model, read_text(model, text, grid), 0, tokens[:, -3:])
    torch.testing.assert_close(part, whole[:, -3:], rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_nothing():
    model = tiny.thinking_model("mistral", thought_tokens=2, ahead_tokens=2)
    tokens, thoughts = tiny.text(1, 6), tiny.random_thoughts(model, 1, 6)
    results = []
    from qstar.learning import Objective

    for checkpointing in (False, True):
        if checkpointing:
            tiny.checkpoint_layers(model)
        model.train()
        model.zero_grad()
        Objective()(model, tokens, thoughts=thoughts).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_attention_dropout_is_refused_on_a_grid():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model.train()
    text = Text.from_inputs(tiny.text(1, 4))
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1 in LlamaAttention"):
        read_grid(model, text, model.grid(4), tiny.random_thoughts(model, 1, 4))


def test_a_text_longer_than_the_model_is_refused():
    model = tiny.thinking_model("gpt2", thought_tokens=4, ahead_tokens=4)
    text = Text.from_inputs(tiny.text(1, 124))
    with pytest.raises(ValueError, match=r"124 text tokens and 9 tokens of a thought .* = 128"):
        read_grid(model, text, model.grid(124), tiny.random_thoughts(model, 1, 124))


@torch.no_grad()
@pytest.mark.parametrize("length", [10, 17, 25])
def test_rotary_factors_that_change_with_the_length_are_one_set_for_text_and_thoughts(length):
    model = tiny.thinking_model("phi3", changes=tiny.LONG_ROPE, thought_tokens=3, ahead_tokens=2, rationales=1)
    text, grid, thoughts = (
        Text.from_inputs(tiny.text(1, length)),
        model.grid(length),
        tiny.random_thoughts(model, 1, length),
    )
    packed = read_grid(model, text, grid, thoughts).unflatten(1, (length, grid.slots))
    reading = read_text(model, text, grid)
    torch.testing.assert_close(reading.hidden, packed[:, :, 0], rtol=1e-5, atol=1e-5)
    rows = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    rows = rows.unflatten(1, (length, grid.slots))
    for step in range(grid.rationale_length):
        states = advance(model, reading, step, rows[..., 1 + step, None])
        torch.testing.assert_close(states[:, :, 0], packed[:, :, 1 + step], rtol=1e-4, atol=1e-5)
    last = torch.cat([text.tokens[0], rows[0, -1, 1:]])
    torch.testing.assert_close(packed[0, -1, -1], reference.hidden_states(model, last)[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [11, 16])
def test_a_text_whose_thoughts_would_have_other_rotary_factors_is_refused(length):
    model = tiny.thinking_model("phi3", changes=tiny.LONG_ROPE, thought_tokens=3, ahead_tokens=2, rationales=1)
    text, grid = Text.from_inputs(tiny.text(1, length)), model.grid(length)
    message = f"a text of {length} tokens and 6 more cross original_max_position_embeddings = 16, where Phi3ForCausalLM"
    with pytest.raises(ValueError, match=message):
        read_text(model, text, grid)
    with pytest.raises(ValueError, match=message + ".* at most 10 tokens, or more than 16"):
        read_grid(model, text, grid, tiny.random_thoughts(model, 1, length))


def test_a_text_that_goes_on_beyond_the_limit_of_its_rotary_factors_is_refused():
    model = tiny.thinking_model("phi3", changes=tiny.LONG_ROPE, thought_tokens=3, ahead_tokens=2, rationales=1)
    tokens = tiny.text(1, 25)
    reading = read_text(model, Text.from_inputs(tokens[:, :8]), model.grid(8))
    with pytest.raises(ValueError, match="a text of 8 tokens and 23 more cross original_max_position_embeddings = 16"):
        read_on(model, reading, Text.from_inputs(tokens))


def test_wrapping_says_where_rotary_factors_change(caplog):
    tiny.thinking_model("phi3", changes=tiny.LONG_ROPE, thought_tokens=3, ahead_tokens=2)
    assert "Phi3ForCausalLM changes its rotary factors at 16 tokens: shorter texts whose thoughts" in caplog.text
    caplog.clear()
    tiny.thinking_model("phi3", thought_tokens=3, ahead_tokens=2)
    assert "rotary factors" not in caplog.text
