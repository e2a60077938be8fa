"""Sampling by noise that a text brings with it: the distribution of the logits, and the same draws in any batch."""

from __future__ import annotations

import math

import pytest
import torch

from qstar.evaluation.sampling import SeededSampling

LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.5])


def drawn(texts, temperature=1.0, seed=0, logits=LOGITS):
    return SeededSampling(temperature, seed, 0)(texts, logits.expand(len(texts), -1)).argmax(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature):
    texts = torch.arange(1, 4001)[:, None]
    counts = torch.bincount(drawn(texts, temperature), minlength=5)
    for count, p in zip(counts.tolist(), (LOGITS / temperature).softmax(-1).tolist(), strict=True):
        assert abs(count - 4000 * p) < 4 * math.sqrt(4000 * p * (1 - p))


def test_a_token_that_is_ruled_out_is_not_drawn():
    logits = LOGITS.clone()
    logits[2] = -math.inf
    tokens = drawn(torch.arange(1, 501)[:, None], 3.0, logits=logits)
    assert 2 not in tokens and len(tokens.unique()) == 4


def test_a_text_draws_the_same_in_any_batch_and_behind_any_padding():
    texts = torch.randint(1, 30, (40, 6), generator=torch.Generator().manual_seed(0))
    sampling = SeededSampling(1.0, 3, 0)
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    whole = sampling(texts, logits)
    padded = torch.cat([torch.zeros(40, 3, dtype=torch.int64), texts], dim=1)
    assert torch.equal(sampling(padded, logits), whole)
    assert torch.equal(sampling(texts[5:6], logits[5:6]), whole[5:6])
    assert torch.equal(sampling(texts.flip(0), logits.flip(0)), whole.flip(0))


def test_other_seeds_and_other_texts_draw_otherwise():
    texts = torch.arange(1, 201)[:, None]
    first = drawn(texts)
    assert torch.equal(drawn(texts), first)
    for other in (drawn(texts, seed=1), drawn(texts + 1), drawn(torch.cat([texts, texts], dim=1))):
        share = (other == first).float().mean()
        expected = LOGITS.softmax(-1).square().sum()  # of independent draws that agree
        assert abs(share - expected) < 0.15
