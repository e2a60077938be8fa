"""Thinking: the cached path against the packed pass, seeds, and what may be said."""

from __future__ import annotations

import pytest
import tiny
import torch

from qstar import reference
from qstar.grid import Text
from qstar.talking import talk
from qstar.thinking import advance, read_text, think


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
def test_forced_thought_step_by_step_gives_the_packed_talk(family):
    """The cached path with a forced thought gives the talk log-probabilities of the packed pass."""
    model = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=3, rationales=1)
    text, grid = Text.from_inputs(tiny.text(2, 8)), model.grid(8)
    thoughts = tiny.random_thoughts(model, 2, 8)
    packed = talk(model, text, grid, thoughts)
    rows = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    rows = rows.unflatten(1, (8, grid.slots))
    reading = read_text(model, text, grid)
    for step in range(grid.rationale_length):
        states = advance(model, reading, step, rows[:, :, 1 + step, None])[:, :, 0]
        k = step - grid.thought_tokens - 1
        if k < 0:
            continue
        count = 8 - 1 - k
        u, g = reading.hidden[:, k : k + count], states[:, :count]
        head = model.qstar_mixing_head
        w = head.output(torch.relu(head.hidden(torch.relu(head.input(torch.cat([u, g], dim=-1))))))
        mixed = reference.logits(model, u + w * (g - u)).log_softmax(-1)
        expected = mixed.gather(-1, text.tokens[:, k + 1 :, None])[..., 0]
        torch.testing.assert_close(packed.log_talk[:, :count, 0, k], expected, rtol=1e-5, atol=1e-5)


def test_sampling_follows_the_seed_alone():
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(4, 6)), model.grid(6)
    whole = think(model, text, grid, temperature=1.0, seed=7)
    assert torch.equal(whole, think(model, text, grid, temperature=1.0, seed=7))
    assert not torch.equal(whole, think(model, text, grid, temperature=1.0, seed=8))
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])


def test_processes_that_share_a_batch_draw_what_one_draws():
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=1)
    tokens, grid = tiny.text(4, 6), model.grid(6)
    whole = think(model, Text.from_inputs(tokens), grid, temperature=1.0, seed=7)
    rows = 2 * 6 * grid.rationales
    for rank in range(2):
        part = Text.from_inputs(tokens[2 * rank : 2 * rank + 2])
        mine = think(model, part, grid, temperature=1.0, seed=7, row_offset=rank * rows)
        assert torch.equal(mine, whole[2 * rank : 2 * rank + 2])


def test_greedy_thoughts_take_the_most_probable_token():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1, rationales=1)
    text, grid = Text.from_inputs(tiny.text(2, 6)), model.grid(6)
    thoughts = think(model, text, grid, temperature=0.0)
    policy = talk(model, text, grid, thoughts).policy
    assert torch.equal(thoughts, reference.logits(model, policy).argmax(-1))


def test_thought_tokens_are_never_said():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[[model.qstar.start_token_id, model.qstar.end_token_id]] *= 100
    text = Text.from_inputs(tiny.text(2, 6))
    for temperature in (0.0, 1.0):
        thoughts = think(model, text, model.grid(6), temperature=temperature)
        assert not torch.isin(thoughts, model.language_head().forbidden).any()


def test_thinking_leaves_the_mode_alone_and_works_with_checkpointing():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(2, 6)), model.grid(6)
    expected = think(model, text, grid, temperature=0.0)
    tiny.checkpoint_layers(model)
    model.train()
    assert torch.equal(think(model, text, grid, temperature=0.0), expected)
    assert model.training


@pytest.mark.parametrize("last", [0, -1, 4])
def test_thinking_at_more_positions_than_there_are_is_refused(last):
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    text = Text.from_inputs(tiny.text(1, 3))
    with pytest.raises(ValueError, match=rf"last is {last}, but it must be in 1\.\.3"):
        think(model, text, model.grid(3), temperature=0.0, last=last)


def test_the_cache_refuses_a_step_beyond_its_end():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(1, 3)), model.grid(3)
    reading = read_text(model, text, grid)
    with pytest.raises(ValueError, match=r"step is 4, but it must be in 0\.\.3"):
        advance(model, reading, 4, torch.zeros(1, 3, 2, dtype=torch.int64))
