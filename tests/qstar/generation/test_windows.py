"""The cache of a text lets go of what a sliding window hides for good, and holds no copies of the rest."""

from __future__ import annotations

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded

from qstar.cache import CachedLayer

WINDOW = 4


@pytest.mark.parametrize("drafts", [0, 6])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss", "qwen2"])
def test_windowed_layers_stay_small_and_every_logit_stays_right(family, drafts):
    model = opinionated(family)
    tokens, mask = padded(2, 30)
    output = generate(model, tokens, mask, max_new_tokens=40, drafts=drafts)
    expected, _ = packed_log_probs(model, output, mask)
    torch.testing.assert_close(output.logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
    layers = output.past_key_values.keys.layers
    held = [layer.keys.shape[2] for layer in layers]
    assert all(layer.length == 69 for layer in layers)
    windowed = [layer for layer in layers if layer.window is not None]
    assert windowed and all(layer.window == WINDOW for layer in windowed)
    for layer in windowed:  # two windows, the tokens of a round, and those that thoughts add
        assert layer.keys.shape[2] <= 2 * WINDOW + drafts + 1
        assert layer.keys.untyped_storage().nbytes() <= 8 * 30 * layer.keys[0, :, 0].numel() * 4
    assert (69 in held) == (family != "mistral")


def test_a_prompt_may_go_on_behind_a_window():
    model = opinionated("mistral")
    tokens, mask = padded(2, 30)
    first = generate(model, tokens, mask, max_new_tokens=10)
    longer = torch.cat([first.sequences, tiny.text(2, 7, seed=9)], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, 17)], dim=1)
    gone_on = generate(model, longer, mask, past_key_values=first.past_key_values)
    fresh = generate(model, longer, mask)
    assert torch.equal(gone_on.sequences, fresh.sequences)
    torch.testing.assert_close(gone_on.logits, fresh.logits, rtol=1e-4, atol=1e-4)


def filled(window: int | None, *lengths: int) -> tuple[CachedLayer, torch.Tensor]:
    layer, text = CachedLayer(), torch.randn(1, 2, sum(lengths), 3)
    for part in text.split(lengths, dim=2):
        layer.append_text(part, 2 * part, window)
        layer.let_go()
    return layer, text


def test_letting_go_keeps_what_the_next_token_sees():
    layer, text = filled(5, 7, 2, 1, 1, 1, 8)
    assert layer.length == 20 and layer.gone > 0
    assert torch.equal(layer.keys, text[:, :, layer.gone :])
    assert torch.equal(layer.values, 2 * text[:, :, layer.gone :])
    assert 4 <= layer.keys.shape[2] <= 10


def test_without_a_window_nothing_goes():
    layer, text = filled(None, 7, 2, 1, 1, 30)
    assert layer.gone == 0 and torch.equal(layer.keys, text)


def test_appending_moves_the_text_seldom():
    layer, _ = filled(None, 10, 1)
    places = set()
    for _ in range(500):
        layer.append_text(torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3))
        places.add(layer.keys.data_ptr())
    assert layer.length == 511 and len(places) <= 6


def test_a_cut_text_goes_on_as_if_it_had_been_short():
    layer, text = filled(None, 10, 3)
    layer.cut(9)
    more = torch.randn(1, 2, 4, 3)
    layer.append_text(more, more)
    assert torch.equal(layer.keys, torch.cat([text[:, :, :9], more], dim=2))
    with pytest.raises(ValueError, match=r"length is 14, but it must be in 0\.\.13: what the cache holds"):
        layer.cut(14)
    layer, _ = filled(2, 10)
    with pytest.raises(ValueError, match=r"length is 8, but it must be in 9\.\.10: what the cache holds"):
        layer.cut(8)


def test_rows_are_taken_in_another_order():
    layer, text = CachedLayer(), torch.randn(3, 2, 4, 3)
    layer.append_text(text, 2 * text)
    layer.take_rows(torch.tensor([2, 0]))
    assert torch.equal(layer.keys, text[[2, 0]]) and torch.equal(layer.values, 2 * text[[2, 0]])
