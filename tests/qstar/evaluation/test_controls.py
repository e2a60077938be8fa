"""What is read in the place of thoughts."""

from __future__ import annotations

import pytest
import tiny
import torch

from qstar.evaluation.controls import elsewhere, pause_token, pauses, random_tokens
from qstar.wrapping import wrap

SHAPES = [(2, 3), (1, 3), (4, 3)]


def test_a_pause_is_a_dot_where_there_is_one_and_else_the_token_that_opens_a_thought():
    tokenizer = tiny.tokenizer()
    model = wrap(tiny.plain_model("llama"), tokenizer, thought_tokens=3)
    assert pause_token(model, tokenizer) == model.qstar.start_token_id
    tokenizer.add_tokens(["."])
    assert pause_token(model, tokenizer) == tokenizer.convert_tokens_to_ids(".")
    found = pauses(SHAPES, 7)
    assert [tuple(each.shape) for each in found] == SHAPES and all((each == 7).all() for each in found)


def test_random_tokens_are_words_and_the_same_for_the_same_seed():
    tokenizer = tiny.tokenizer()
    model = wrap(tiny.plain_model("llama"), tokenizer, thought_tokens=3)
    found = random_tokens(model, tokenizer, [(50, 3)] * 3, seed=4)
    words = torch.cat(found)
    special = {*tokenizer.all_special_ids, model.qstar.start_token_id, model.qstar.end_token_id}
    assert not special.intersection(words.unique().tolist())
    assert len(words.unique()) == len(tokenizer) - len(special)
    assert all(torch.equal(x, y) for x, y in zip(found, random_tokens(model, tokenizer, [(50, 3)] * 3, 4), strict=True))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], random_tokens(model, tokenizer, [(50, 3)], seed=5)[0])


@pytest.mark.parametrize("seed", range(5))
def test_every_position_gets_the_thought_of_another(seed):
    thoughts = [torch.arange(length)[:, None].expand(-1, 3) + 10 * number for number, (length, _) in enumerate(SHAPES)]
    found = elsewhere(thoughts, seed)
    assert [tuple(each.shape) for each in found] == SHAPES
    before, after = (torch.cat(list(each)) for each in (thoughts, found))
    assert not (before == after).any()
    assert torch.equal(before.sort(0).values, after.sort(0).values)
    assert all(torch.equal(x, y) for x, y in zip(found, elsewhere(thoughts, seed), strict=True))


def test_a_single_thought_has_no_other_place():
    with pytest.raises(ValueError, match="thoughts are at one position, but there must be another to take one from"):
        elsewhere([torch.zeros(1, 3)], 0)
