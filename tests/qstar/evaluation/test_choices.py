"""Questions with permitted answers, against plain passes of the model over every question and thought."""

from __future__ import annotations

import pytest
import tiny
import torch
from plain_answers import answer_log_probs, greedy_thought

from qstar import reference
from qstar.evaluation.choices import choice_log_probs
from qstar.grid import Text
from qstar.talking import speak
from qstar.thinking import read_text, think

CHOICES = torch.tensor([4, 9, 17])


def plain_answers(model, prompts, thoughts=None):
    """``[B, A]``, every prompt by itself."""
    thoughts = [None] * len(prompts) if thoughts is None else thoughts
    pairs = zip(prompts, thoughts, strict=True)
    return torch.stack([answer_log_probs(model, prompt, CHOICES, thought) for prompt, thought in pairs])


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("thought_tokens", [1, 3])
def test_answers_with_and_without_thoughts_are_those_of_plain_passes(family, thought_tokens):
    model = tiny.thinking_model(family, thought_tokens=thought_tokens, ahead_tokens=2, rationales=2)
    prompts = tiny.text(3, 6)
    own, given = (
        torch.stack([greedy_thought(model, prompt) for prompt in prompts]),
        tiny.text(3, thought_tokens, seed=9),
    )
    cases = [(False, None, None), (True, None, own), (True, given, given)]
    found = []
    for thinking, thoughts, expected in cases:
        ours = choice_log_probs(model, prompts, CHOICES, thinking=thinking, thoughts=thoughts)
        torch.testing.assert_close(ours, plain_answers(model, prompts, expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.exp().sum(-1), torch.ones(3))
        found.append(ours)
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


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


def test_thoughts_that_would_be_ignored_are_refused():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    prompts = tiny.text(3, 4)
    with pytest.raises(ValueError, match="thoughts are given, but thinking is False"):
        choice_log_probs(model, prompts, CHOICES, thinking=False, thoughts=tiny.text(3, 2))
    with pytest.raises(ValueError, match=r"thoughts have shape \[3, 5\], but it must be \[B, K\] = \[3, 2\]"):
        choice_log_probs(model, prompts, CHOICES, thinking=True, thoughts=tiny.text(3, 5))
