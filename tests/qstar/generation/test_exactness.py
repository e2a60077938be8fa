"""Every generated token comes from the prediction that training makes after the same thought."""

from __future__ import annotations

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded

EVERYDAY = ("deepseek_v3", "gemma2", "gpt2", "gpt_oss", "llama", "mistral")
FAMILIES = [pytest.param(name, marks=[] if name in EVERYDAY else pytest.mark.slow) for name in sorted(tiny.FAMILIES)]


def check_against_packed_pass(model, tokens, mask, tolerance: float, **options):
    output = generate(model, tokens, mask, **options)
    expected, weight = packed_log_probs(model, output, mask)
    ours = output.logits.log_softmax(-1)
    allowed = torch.isfinite(expected)
    assert torch.equal(allowed, torch.isfinite(ours))
    error = (ours - expected)[allowed].norm() / expected[allowed].norm()
    assert error < tolerance, error
    torch.testing.assert_close(output.thought_weights, weight, rtol=0, atol=20 * tolerance)
    assert output.thought_weights.abs().min() > 1e-4
    assert not torch.isin(output.sequences, model.qstar_forbidden).any()
    assert not torch.isin(output.thoughts, model.qstar_forbidden).any()


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_packed_pass(family, rows, drafts):
    model = opinionated(family)
    tokens, mask = padded(rows, 9)
    check_against_packed_pass(model, tokens, mask, 1e-5, drafts=drafts)


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2"])
def test_logits_are_those_of_the_packed_pass_in_float64(family, drafts):
    model = opinionated(family, dtype=torch.float64)
    tokens, mask = padded(3, 9)
    tolerance = 1e-12 if family == "gpt2" else 1e-6  # the others have rotary factors, and norms, in float32
    check_against_packed_pass(model, tokens, mask, tolerance, drafts=drafts)


@pytest.mark.parametrize("thought_tokens", [1, 2, 6])
def test_thoughts_may_have_another_length_than_in_training(thought_tokens):
    model = opinionated("llama")
    check_against_packed_pass(model, *padded(2, 9), 1e-5, thought_tokens=thought_tokens)


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(length):
    model = opinionated("mistral")
    check_against_packed_pass(model, tiny.text(2, length), None, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_change_no_token_and_no_thought(family):
    model = opinionated(family)
    tokens, mask = padded(3, 9)
    plain = generate(model, tokens, mask, drafts=0)
    for drafts in (1, 3, 8):
        ahead = generate(model, tokens, mask, drafts=drafts)
        assert torch.equal(ahead.sequences, plain.sequences)
        assert torch.equal(ahead.thoughts, plain.thoughts)
        torch.testing.assert_close(ahead.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_a_padded_batch_is_the_row_alone(family):
    model = opinionated(family)
    tokens, mask = padded(3, 9)
    batch = generate(model, tokens, mask)
    for row in range(3):
        alone = generate(model, tokens[row : row + 1, row:])
        assert torch.equal(alone.sequences[0], batch.sequences[row, row:])
        assert torch.equal(alone.thoughts[0], batch.thoughts[row])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_thinking_it_is_the_base_model(family):
    plain, model = tiny.plain_model(family), opinionated(family)
    plain.generation_config = model.generation_config
    tokens, mask = padded(2, 9)
    options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False)
    asked = dict(return_dict_in_generate=True, output_logits=True)
    expected = plain.generate(tokens, suppress_tokens=None, **options, **asked)
    ours = model.generate(tokens, think=False, **options, **asked)
    assert torch.equal(ours.sequences, expected.sequences)
    known = expected.logits[0].shape[1]
    for step, logits in zip(ours.logits, expected.logits, strict=True):
        torch.testing.assert_close(step[:, :known], logits, rtol=1e-4, atol=1e-4)
