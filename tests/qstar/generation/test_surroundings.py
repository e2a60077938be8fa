"""Calls inside calls, threads, copies, and caches that outlive what they were made in."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded
from transformers import StoppingCriteria, StoppingCriteriaList

PROMPT = tiny.text(1, 6)


class Aside(StoppingCriteria):
    """Does something in the middle of a generation, and stops nothing."""

    def __init__(self, act):
        self.act, self.results = act, []

    def __call__(self, input_ids, scores, **kwargs):
        self.results.append(self.act())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_a_generation_inside_another_and_the_other_are_what_they_are_alone(outer, inner):
    model = opinionated("llama")
    expected = model.generate(PROMPT, max_new_tokens=6, think=outer)
    alone = model.generate(PROMPT, max_new_tokens=4, think=inner)
    aside = Aside(lambda: model.generate(PROMPT, max_new_tokens=4, think=inner))
    given = dict(max_new_tokens=6, think=outer, stopping_criteria=StoppingCriteriaList([aside]))
    assert torch.equal(model.generate(PROMPT, **given), expected)
    assert len(aside.results) == 6 and all(torch.equal(each, alone) for each in aside.results)


def test_a_model_that_is_copied_or_pickled_while_it_generates_is_not_in_the_middle_of_anything():
    model = opinionated("llama")
    expected = [model.generate(PROMPT, max_new_tokens=4, think=think) for think in (True, False)]
    aside = Aside(lambda: (copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
    model.generate(PROMPT, max_new_tokens=2, think=True, stopping_criteria=StoppingCriteriaList([aside]))
    for other in aside.results[0]:
        for think, text in zip((True, False), expected, strict=True):
            assert torch.equal(other.generate(PROMPT, max_new_tokens=4, think=think), text)


def test_threads_do_not_see_each_other():
    """Two of them generate with one model, another runs a second model without thoughts."""
    model, other = opinionated("llama"), opinionated("mistral")
    expected = {think: model.generate(PROMPT, max_new_tokens=12, think=think) for think in (True, False)}
    logits = other(PROMPT).logits
    wrong = []

    def compare(call, right):
        try:
            wrong.extend(index for index in range(12) if not torch.equal(call(), right))
        except Exception as error:
            wrong.append(error)

    def generating(think):
        return lambda: model.generate(PROMPT, max_new_tokens=12, think=think)

    calls = [(generating(True), expected[True])] * 2 + [(lambda: other(PROMPT).logits, logits)]
    with torch.no_grad():
        threads = [threading.Thread(target=torch.no_grad()(compare), args=call) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert torch.equal(generating(False)(), expected[False])


def test_a_cache_from_inference_mode_goes_on_outside():
    model = opinionated("llama")
    with torch.inference_mode():
        first = generate(model, PROMPT, max_new_tokens=4)
    longer = torch.cat([first.sequences.clone(), tiny.text(1, 3, seed=9)], dim=1)
    expected = generate(model, longer)
    assert torch.equal(generate(model, longer, past_key_values=first.past_key_values).sequences, expected.sequences)


def test_a_cache_of_another_dtype_is_refused():
    model = opinionated("llama")
    first = generate(model, PROMPT, max_new_tokens=4)
    longer = torch.cat([first.sequences, tiny.text(1, 3, seed=9)], dim=1)
    with pytest.raises(
        ValueError, match=r"the cache holds keys of torch\.float32, but is given torch\.float64: the model"
    ):
        generate(model.double(), longer, past_key_values=first.past_key_values)


def test_a_refused_call_leaves_the_cache_as_it_was():
    model = opinionated("llama")
    first = generate(model, PROMPT, max_new_tokens=4)
    longer = torch.cat([first.sequences, tiny.text(1, 3, seed=9)], dim=1)
    with pytest.raises(ValueError, match="max_new_tokenz"):
        generate(model, longer, past_key_values=first.past_key_values, max_new_tokenz=3)
    assert first.past_key_values.get_seq_length() == 9
    expected = generate(model, longer)
    assert torch.equal(generate(model, longer, past_key_values=first.past_key_values).sequences, expected.sequences)


@pytest.mark.parametrize("drafts", [3, 8])
def test_a_cache_goes_on_after_a_generation_that_ended_in_the_middle_of_its_guesses(drafts):
    model = opinionated("llama")
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.zero_()  # all guesses are right
    free = generate(model, PROMPT, max_new_tokens=24, drafts=drafts).sequences[0, 6:].tolist()
    cut_short = 0
    for end in range(4, 20):
        first = generate(model, PROMPT, max_new_tokens=24, drafts=drafts, eos_token_id=free[end])
        longer = torch.cat([first.sequences, tiny.text(1, 3, seed=end)], dim=1)
        expected = generate(model, longer, max_new_tokens=4)
        gone_on = generate(model, longer, max_new_tokens=4, past_key_values=first.past_key_values)
        assert torch.equal(gone_on.sequences, expected.sequences)
        torch.testing.assert_close(gone_on.logits, expected.logits, rtol=1e-4, atol=1e-4)
        cut_short += first.sequences.shape[1] < 30
    assert cut_short == 16


def test_rows_of_a_cache_are_selected_and_repeated():
    model = opinionated("llama")
    tokens, mask = padded(3, 6)
    first = generate(model, tokens, mask, max_new_tokens=4)
    longer = torch.cat([first.sequences, tiny.text(3, 3, seed=9)], dim=1)
    mask = torch.cat([mask, mask.new_ones(3, 7)], dim=1)
    expected = generate(model, longer, mask).sequences
    cache = first.past_key_values
    assert cache.batch_size == 3
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    rows = [2, 2, 0, 0]
    assert cache.batch_size == 4
    assert torch.equal(generate(model, longer[rows], mask[rows], past_key_values=cache).sequences, expected[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_say_what_the_packed_pass_says(dtype):
    model = opinionated("llama", dtype=dtype)
    for drafts in (0, 4):
        output = generate(model, *padded(2, 9), drafts=drafts)
        expected, _ = packed_log_probs(model, output, padded(2, 9)[1])
        allowed = torch.isfinite(expected)
        error = (output.logits.log_softmax(-1) - expected)[allowed].norm() / expected[allowed].norm()
        assert error < 0.02
