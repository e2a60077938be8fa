"""Talking: what a packed pass over text and thoughts lets see what."""

from __future__ import annotations

import tiny
import torch

from qstar import reference
from qstar.grid import Text
from qstar.talking import speak, talk
from qstar.thinking import read_text, think


def test_one_thought_changes_nothing_elsewhere():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=2)
    text = Text.from_inputs(tiny.text(1, 8))
    grid = model.grid(8)
    thoughts = tiny.random_thoughts(model, 1, 8)
    changed = thoughts.clone()
    changed[0, 3, 1] = (changed[0, 3, 1] - 4 + 1) % 26 + 4
    before, after = talk(model, text, grid, thoughts), talk(model, text, grid, changed)
    same = before.log_talk == after.log_talk
    assert not same[0, 3, 1].any()
    same[0, 3, 1] = True
    assert same.all()
    assert torch.equal(before.log_base, after.log_base)


def test_talk_sees_no_later_text():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=3)
    tokens = tiny.text(1, 9)
    thoughts = tiny.random_thoughts(model, 1, 9)
    grid = model.grid(9)
    before = talk(model, Text.from_inputs(tokens), grid, thoughts)
    for changed in range(1, 9):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] - 4 + 1) % 26 + 4
        after = talk(model, Text.from_inputs(other), grid, thoughts)
        for i in range(9):
            for k in range(3):
                if i + k + 1 < changed:  # neither read nor predicted
                    assert torch.equal(before.log_talk[0, i, :, k], after.log_talk[0, i, :, k]), (changed, i, k)


def test_permuting_rationales_permutes_results():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=2, rationales=3)
    text, grid = Text.from_inputs(tiny.text(2, 8)), model.grid(8)
    thoughts = tiny.random_thoughts(model, 2, 8)
    order = torch.tensor([2, 0, 1])
    ours = talk(model, text, grid, thoughts).log_talk
    permuted = talk(model, text, grid, thoughts[:, :, order]).log_talk
    torch.testing.assert_close(permuted, ours[:, :, order], rtol=0, atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    lengths = [5, 1, 4]
    tokens, thoughts = tiny.text(1, 10), tiny.random_thoughts(model, 1, 10)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = talk(model, Text.from_inputs(tokens, position_ids=positions), model.grid(10), thoughts)
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        alone = talk(model, Text.from_inputs(tokens[:, part]), model.grid(length), thoughts[:, part])
        torch.testing.assert_close(together.log_talk[:, part], alone.log_talk, rtol=0, atol=1e-5)
        torch.testing.assert_close(together.log_base[:, part], alone.log_base, rtol=0, atol=1e-5)
        assert torch.equal(together.targets[:, part], alone.targets)
        begin += length


@torch.no_grad()
def test_a_thought_read_again_says_what_it_said_when_it_was_sampled():
    """What thinking left in the cache is what reading the whole thought puts there, bit for bit."""
    model = tiny.thinking_model("mistral", thought_tokens=3, ahead_tokens=1, rationales=2)
    text, grid = Text.from_inputs(tiny.text(2, 7)), model.grid(7)
    reading = read_text(model, text, grid)
    thoughts = think(model, text, grid, temperature=1.0, last=4, reading=reading)
    assert torch.equal(speak(model, reading, thoughts, cached=3), speak(model, read_text(model, text, grid), thoughts))


@torch.no_grad()
def test_speaking_at_every_position_and_rationale_is_a_plain_pass_each():
    model = tiny.thinking_model("gemma2", thought_tokens=2, ahead_tokens=1, rationales=2)
    tokens = tiny.text(1, 5)
    grid, thoughts = model.grid(5), tiny.random_thoughts(model, 1, 5)
    spoken = speak(model, read_text(model, Text.from_inputs(tokens), grid), thoughts)
    base = reference.hidden_states(model, tokens[0])
    edges = tokens.new_tensor([model.qstar.start_token_id, model.qstar.end_token_id])
    for i in range(5):
        for p in range(2):
            whole = torch.cat([tokens[0, : i + 1], edges[:1], thoughts[0, i, p], edges[1:]])
            expected = reference.mix(model, base[i], reference.hidden_states(model, whole)[-1])
            torch.testing.assert_close(spoken[0, i, p], expected, rtol=1e-4, atol=1e-5)
