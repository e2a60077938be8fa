"""The cache of a generation by both of its names in transformers."""

from __future__ import annotations

import pytest
import torch
from spoken import generate, opinionated

from qstar.generation import naming
from qstar.generation.naming import CACHE, OLD_NAME, by_its_name


@pytest.mark.parametrize("name", sorted({CACHE, OLD_NAME}))
def test_generation_goes_on_from_a_cache_by_either_name(name):
    model, prompt = opinionated("llama"), torch.tensor([[5, 9, 4, 7]])
    whole = generate(model, prompt, max_new_tokens=6).sequences
    first = generate(model, prompt, max_new_tokens=3)
    mask = torch.ones_like(first.sequences)
    afresh = generate(model, first.sequences, mask, max_new_tokens=3)
    gone_on = generate(model, first.sequences, mask, max_new_tokens=3, **{name: first[CACHE]})
    assert torch.equal(gone_on.sequences, whole) and torch.equal(afresh.sequences, whole)
    assert gone_on.thinking.passes < afresh.thinking.passes


@pytest.mark.parametrize("name", ["cache", OLD_NAME])
def test_the_name_is_that_of_the_version(monkeypatch, name):
    monkeypatch.setattr(naming, "CACHE", name)
    given = {"max_new_tokens": 3, OLD_NAME: "a cache"}
    assert by_its_name(given) == {"max_new_tokens": 3, name: "a cache"}
    assert by_its_name({"max_new_tokens": 3}) == {"max_new_tokens": 3}


def test_both_names_are_refused(monkeypatch):
    monkeypatch.setattr(naming, "CACHE", "cache")
    with pytest.raises(ValueError, match="cache and past_key_values are both given, but they are one"):
        by_its_name({"cache": None, OLD_NAME: None})
