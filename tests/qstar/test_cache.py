"""One reading of a text, shared by all that comes after it: thoughts are dropped without a trace, and text goes on."""

from __future__ import annotations

import pytest
import tiny
import torch

from qstar.cache import ThoughtCache
from qstar.grid import Text
from qstar.layouts import Extension
from qstar.talking import speak
from qstar.thinking import advance, read_on, read_text, think

FAMILIES = sorted(tiny.FAMILIES)
LENGTH = 9


def texts(length: int, begin: int = 0):
    """A batch with padding on the left of one row and two documents in the other."""
    tokens = tiny.text(2, LENGTH)[:, :length]
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :2] = 0
    positions = torch.stack([torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3]), (torch.arange(LENGTH) - 2).clamp(min=0)])
    return Text.from_inputs(tokens, mask[:, :length], position_ids=positions[:, :length]), mask[:, :length].bool()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [(4,), (1, 5, 6), (8,)], ids=str)
def test_a_text_read_in_parts_is_the_text_read_at_once(family, cuts):
    model = tiny.thinking_model(family, thought_tokens=2, ahead_tokens=1)
    text, valid = texts(LENGTH)
    grid = model.grid(LENGTH)
    whole = read_text(model, text, grid)
    parts = read_text(model, texts(cuts[0])[0], grid)
    for cut in (*cuts[1:], LENGTH):
        parts = read_on(model, parts, texts(cut)[0])
    assert parts.cache.text_length == LENGTH
    torch.testing.assert_close(parts.hidden[valid], whole.hidden[valid], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(parts.cache.layers, whole.cache.layers, strict=True):
        for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(x.movedim(2, 1)[valid], y.movedim(2, 1)[valid], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_thoughts_about_a_text_that_goes_on_are_those_of_a_fresh_reading(family):
    model = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=1, rationales=1)
    short, (long, _) = texts(5)[0], texts(LENGTH)
    grid = model.grid(LENGTH)
    reading = read_text(model, short, grid)
    think(model, short, grid, temperature=1.0, seed=3, last=2, reading=reading)
    reading = read_on(model, reading, long)
    ours = think(model, long, grid, temperature=1.0, seed=4, last=3, reading=reading)
    assert torch.equal(ours, think(model, long, grid, temperature=1.0, seed=4, last=3))
    fresh = speak(model, read_text(model, long, grid), ours)
    torch.testing.assert_close(speak(model, reading, ours, cached=3), fresh, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_dropped_thoughts_leave_no_trace():
    """The next ones may stand at other positions, and are as if the first had never been."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    text, _ = texts(LENGTH)
    grid = model.grid(LENGTH)
    reading, fresh = (read_text(model, text, grid) for _ in range(2))
    advance(model, reading, 0, tiny.random_thoughts(model, 2, LENGTH)[..., 0])
    reading.cache.drop_thoughts()
    with pytest.raises(ValueError, match="the cache holds no thoughts"):
        reading.cache.layers[0].thoughts()
    tokens = tiny.random_thoughts(model, 2, 4, seed=7)[..., 0]
    assert torch.equal(advance(model, reading, 0, tokens), advance(model, fresh, 0, tokens))


@torch.no_grad()
def test_text_does_not_go_on_behind_thoughts_that_were_not_dropped():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    text, _ = texts(LENGTH)
    reading = read_text(model, text, model.grid(LENGTH))
    advance(model, reading, 0, tiny.random_thoughts(model, 2, LENGTH)[..., 0])
    layout = Extension(reading.cache)
    with pytest.raises(ValueError, match=r"drop_thoughts\(\) comes before more text"):
        model.read(text.tokens[:, :1], torch.full((2, 1), LENGTH), layout)
    with pytest.raises(ValueError, match="text has 9 tokens, but it must have more than the 9 read so far"):
        read_on(model, reading, text)


def test_an_empty_cache_holds_no_text():
    assert ThoughtCache(rationales=2, rationale_length=4).text_length == 0


@torch.no_grad()
@pytest.mark.parametrize("cached", [-1, 4])
def test_speaking_reads_the_end_token_itself(cached):
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    text, _ = texts(LENGTH)
    reading = read_text(model, text, model.grid(LENGTH))
    with pytest.raises(ValueError, match=rf"cached is {cached}, but it must be in 0\.\.3"):
        speak(model, reading, tiny.random_thoughts(model, 2, LENGTH), cached=cached)


@torch.no_grad()
def test_a_reading_that_has_gone_on_is_not_used_again():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    short, (long, _) = texts(5)[0], texts(LENGTH)
    grid = model.grid(LENGTH)
    old = read_text(model, short, grid)
    read_on(model, old, long)
    message = "reading is of 5 tokens, but its cache has gone on to 9: take the later one"
    with pytest.raises(ValueError, match=message):
        read_on(model, old, long)
    with pytest.raises(ValueError, match=message):
        speak(model, old, tiny.random_thoughts(model, 2, 5))
    with pytest.raises(ValueError, match=message):
        think(model, short, grid, temperature=0.0, reading=old)


@torch.no_grad()
def test_thinking_again_at_other_positions_forgets_what_was_thought():
    model = tiny.thinking_model("llama", thought_tokens=3, ahead_tokens=1)
    text, _ = texts(LENGTH)
    grid = model.grid(LENGTH)
    reading = read_text(model, text, grid)
    for last in (None, 2, 5, LENGTH):
        options = dict(temperature=1.0, seed=last or 0, last=last)
        thoughts = think(model, text, grid, **options, reading=reading)
        assert torch.equal(thoughts, think(model, text, grid, **options))
        fresh = speak(model, read_text(model, text, grid), thoughts[:, -2:])
        torch.testing.assert_close(speak(model, reading, thoughts[:, -2:]), fresh, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_reading_of_another_text_or_with_another_room_is_refused():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1, rationales=2)
    text, other = texts(LENGTH)[0], Text.from_inputs(tiny.text(2, LENGTH, seed=5))
    reading = read_text(model, text, model.grid(LENGTH))
    with pytest.raises(ValueError, match="reading is of another text"):
        think(model, other, model.grid(LENGTH), temperature=0.0, reading=reading)
    for changes, asked in ((dict(rationales=1), (1, 4)), (dict(thought_tokens=3), (2, 5))):
        with pytest.raises(
            ValueError, match=rf"room for \(r, T\) = \(2, 4\), but grid asks for \({asked[0]}, {asked[1]}\)"
        ):
            think(model, text, model.grid(LENGTH, **changes), temperature=0.0, reading=reading)


@torch.no_grad()
def test_a_text_does_not_go_on_beyond_what_the_model_knows():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    tokens = tiny.text(1, 126)
    reading = read_text(model, Text.from_inputs(tokens[:, :100]), model.grid(100))
    with pytest.raises(ValueError, match="126 text tokens and 4 tokens of a thought make more than"):
        read_on(model, reading, Text.from_inputs(tokens))
