"""Thoughts only where they pay: where that is, what is said elsewhere, and what it costs."""

from __future__ import annotations

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded

from qstar.generation.when import ThinkWhen
from qstar.grid import Text
from qstar.layouts import Packed


@torch.no_grad()
def base_log_probs(model, sequences, mask, said: int):
    """Log-probabilities ``[B, L, V]`` of the base model before each of the last ``said`` tokens."""
    mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - 1 - mask.shape[1])], dim=1)
    text = Text.from_inputs(sequences[:, :-1], mask)
    hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start))
    return model.language_head().logits(hidden[:, -said:]).log_softmax(-1), text.positions[:, -said:]


@pytest.mark.parametrize("drafts", [0, 5])
@pytest.mark.parametrize("rule", ["always", "never", "every:3", "entropy:2.8", "entropy:0", "entropy:9"])
def test_each_token_comes_from_the_prediction_that_the_rule_says(rule, drafts):
    model = opinionated("llama")
    tokens, mask = padded(3, 7)
    options = dict(drafts=drafts) if rule != "never" else {}
    output = generate(model, tokens, mask, think_when=rule, max_new_tokens=12, **options)
    talk, weight = packed_log_probs(model, output, mask)
    base, positions = base_log_probs(model, output.sequences, mask, 12)
    entropy = torch.special.entr(base.exp()).sum(-1)
    where = {
        "always": torch.ones_like(positions, dtype=torch.bool),
        "never": torch.zeros_like(positions, dtype=torch.bool),
        "every:3": positions % 3 == 0,
        "entropy:2.8": entropy > 2.8,
        "entropy:0": entropy > 0,
        "entropy:9": entropy > 9,
    }[rule]
    expected = torch.where(where[..., None], talk, base)
    torch.testing.assert_close(output.logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.thought_weights, torch.where(where, weight, 0), rtol=1e-3, atol=1e-4)
    assert torch.equal(output.thought_at, where)
    assert (output.thoughts[~where] == model.qstar.end_token_id).all()
    assert not (output.thoughts[where] == model.qstar.end_token_id).any()
    assert output.thinking.thought_share == pytest.approx(float(where.float().mean()))
    assert 0.2 < output.thinking.thought_share < 0.9 or rule in ("always", "never", "entropy:0", "entropy:9")


def test_a_token_without_a_thought_costs_one_pass():
    model = opinionated("llama")
    passes = {
        rule: generate(model, tiny.text(1, 6), think_when=rule, max_new_tokens=12, drafts=0).thinking.passes
        for rule in ("always", "every:3", "entropy:9")
    }
    assert passes == {"always": 1 + 12 * 4, "every:3": 1 + 8 + 4 * 4, "entropy:9": 1 + 12}
    never = generate(model, tiny.text(1, 6), think_when="never", max_new_tokens=12)
    assert never.thinking.passes == 13 and never.thinking.thought_share == 0


def test_what_a_row_thinks_does_not_depend_on_the_others():
    model = opinionated("mistral")
    tokens, mask = padded(3, 9)
    batch = generate(model, tokens, mask, think_when="entropy:2.8")
    for row in range(3):
        alone = generate(model, tokens[row : row + 1, row:], think_when="entropy:2.8")
        assert torch.equal(alone.sequences[0], batch.sequences[row, row:])
        assert torch.equal(alone.thoughts[0], batch.thoughts[row])


@pytest.mark.parametrize(
    "text, rule",
    [
        ("always", ThinkWhen()),
        ("never", ThinkWhen(every=0)),
        ("every:1", ThinkWhen(every=1)),
        ("every:12", ThinkWhen(every=12)),
        ("entropy:1.5", ThinkWhen(entropy=1.5)),
        ("entropy:0", ThinkWhen(entropy=0.0)),
    ],
)
def test_rules_are_read(text, rule):
    assert ThinkWhen.parse(text) == rule


@pytest.mark.parametrize(
    "text", ["", "every", "every:0", "every:-1", "every:1.5", "entropy:", "entropy:inf", "entropy:-1", 4, None]
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ValueError, match=r"think_when is .*, but it must be 'always', 'never', 'every:N' .* H nats"):
        ThinkWhen.parse(text)
