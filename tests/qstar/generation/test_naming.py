"""The cache of a generation by both of its names in transformers."""

from __future__ import annotations

import pytest
import torch
from spoken import generate, opinionated

from qstar.generation import naming
from qstar.generation.naming import CACHE, NAMES, by_its_name


@pytest.mark.parametrize("name", NAMES)
def test_generation_goes_on_from_a_cache_by_any_name(name):
    model, prompt = opinionated("llama"), torch.tensor([[5, 9, 4, 7]])
    whole = generate(model, prompt, max_new_tokens=6).sequences
    first = generate(model, prompt, max_new_tokens=3)
    mask = torch.ones_like(first.sequences)
    afresh = generate(model, first.sequences, mask, max_new_tokens=3)
    gone_on = generate(model, first.sequences, mask, max_new_tokens=3, **{name: first[CACHE]})
    assert torch.equal(gone_on.sequences, whole) and torch.equal(afresh.sequences, whole)
    assert gone_on.thinking.passes < afresh.thinking.passes


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_of_ones_own_with_such_a_cache_is_refused_by_any_name(name):
    model, prompt = opinionated("llama"), torch.tensor([[5, 9, 4, 7]])
    cache = generate(model, prompt, max_new_tokens=3)[CACHE]
    with pytest.raises(
        ValueError, match=rf"{CACHE} is a ThinkingCache, which model.generate\(think=True\) reads alone"
    ):
        model(prompt, **{name: cache})


@pytest.mark.parametrize("version", NAMES[:2])
def test_the_name_is_that_of_the_version(monkeypatch, version):
    monkeypatch.setattr(naming, "CACHE", version)
    for name in NAMES:
        assert by_its_name({"max_new_tokens": 3, name: "a cache"}) == {"max_new_tokens": 3, version: "a cache"}
    assert by_its_name({"max_new_tokens": 3}) == {"max_new_tokens": 3}
    assert by_its_name(dict.fromkeys(NAMES) | {"cache": "a cache"}) == {version: "a cache"}
    with pytest.raises(ValueError, match="cache and past_key_values are both given, but they are names of one thing"):
        by_its_name({"cache": "a cache", "past_key_values": "another"})


def test_generate_is_told_that_the_cache_holds_its_text():
    """As transformers asks from 5.24 on, before it leaves out what has been read."""
    cache = generate(opinionated("llama"), torch.tensor([[5, 9, 4, 7]]), max_new_tokens=3)[CACHE]
    assert not all(cache.is_linear)
