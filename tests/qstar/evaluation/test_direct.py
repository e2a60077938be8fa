"""Direct answers, against a few lines that compute the paper's metric from plain logits."""

from __future__ import annotations

import copy
import math

import pytest
import tiny
import torch
from plain_answers import greedy_thought
from scripted_model import TOKENIZER

from qstar import reference
from qstar.evaluation.direct import answer_directly, thoughts_of
from qstar.evaluation.questions import Question
from qstar.evaluation.tasks import find_task
from qstar.wrapping import wrap

GSM8K = find_task("gsm8k")
NUMBERS = [Question("2 + 4?", "6"), Question("600 + 601?", "1,201"), Question("4 - 10?", "-6"), Question("?", "70")]
WORDS = [TOKENIZER.decode([token]) for token in range(len(TOKENIZER))]
DIGITS = [word.removeprefix(" ") == "\n" or word.removeprefix(" ").isdecimal() for word in WORDS]
PERMITTED = torch.tensor(
    [token for token, permitted in enumerate(DIGITS) if permitted and token not in TOKENIZER.added_tokens_decoder]
)
CHOICES = ("a stone", "the sea at night", "ox")


@pytest.fixture(scope="module")
def model():
    """One that thinks in the words of a tokenizer whose words are mostly characters."""
    plain = tiny.plain_model("llama", vocab_size=len(TOKENIZER))
    model = wrap(plain, copy.deepcopy(TOKENIZER), thought_tokens=3, ahead_tokens=1)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.normal_(0, 0.5)
    return model


@torch.no_grad()
def paper_metric(model, text: str, begin: int, thinking: bool):
    """Probability, whether it is right, log-likelihood: a plain pass for every token from ``begin`` on."""
    tokens = torch.tensor(TOKENIZER(text)["input_ids"])
    probability, right, log_likelihood = 1.0, True, 0.0
    for place in range(begin, len(tokens)):
        state = reference.hidden_states(model, tokens[:place])[-1]
        if thinking:
            edges = [torch.tensor([token]) for token in (model.qstar.start_token_id, model.qstar.end_token_id)]
            whole = torch.cat([tokens[:place], edges[0], greedy_thought(model, tokens[:place]), edges[1]])
            state = reference.mix(model, state, reference.hidden_states(model, whole)[-1])
        p = reference.logits(model, state).softmax(-1)
        log_likelihood += math.log(p[tokens[place]])
        if tokens[place] in PERMITTED:
            probability *= float(p[tokens[place]] / p[PERMITTED].sum())
            right = right and bool(PERMITTED[p[PERMITTED].argmax()] == tokens[place])
    return probability, right, log_likelihood


@pytest.mark.parametrize("thinking", [False, True])
def test_numbers_are_scored_as_in_the_paper(model, thinking):
    thoughts = "own" if thinking else None
    found = dict(answer_directly(model, TOKENIZER, GSM8K, NUMBERS, thoughts=thoughts, batch_size=3))
    assert sorted(found) == list(range(len(NUMBERS)))
    for place, question in enumerate(NUMBERS):
        prompt = f"Q: {question.text}\nA:"
        probability, right, log_likelihood = paper_metric(
            model, f"{prompt} {question.answer}\n", len(TOKENIZER(prompt)["input_ids"]), thinking
        )
        assert found[place].probability == pytest.approx(probability, rel=1e-4)
        assert found[place].log_likelihood == pytest.approx(log_likelihood, rel=1e-4)
        assert found[place].right == right
        assert set(found[place].said) <= set("0123456789 \n")
        assert set(found[place].detail) == ({"thoughts"} if thinking else set())


def test_thoughts_are_kept_and_can_be_read_again(model):
    own = dict(answer_directly(model, TOKENIZER, GSM8K, NUMBERS, thoughts="own"))
    answers = [own[place] for place in range(len(NUMBERS))]
    again = dict(answer_directly(model, TOKENIZER, GSM8K, NUMBERS, thoughts=thoughts_of(answers)))
    for place, answered in enumerate(answers):
        assert again[place].detail == answered.detail
        assert again[place].log_likelihood == pytest.approx(answered.log_likelihood, rel=1e-5)
        length = len(TOKENIZER(f" {NUMBERS[place].answer}\n")["input_ids"])
        assert [len(each) for each in answered.detail["thoughts"]] == [length]
        assert all(len(thought) == 3 for thought in answered.detail["thoughts"][0])


@torch.no_grad()
@pytest.mark.parametrize("right", range(3))
def test_choices_are_compared_by_their_likelihood(model, right):
    task = find_task("arc_easy")
    question = Question("What is large?", "ABC"[right], CHOICES, ("A", "B", "C"))
    [(_, found)] = answer_directly(model, TOKENIZER, task, [question], thoughts=None)
    prompt, expected = "Question: What is large?\nAnswer:", []
    for choice in CHOICES:
        tokens = torch.tensor(TOKENIZER(f"{prompt} {choice}")["input_ids"])
        log_p = reference.logits(model, reference.hidden_states(model, tokens)).log_softmax(-1)
        begin = len(TOKENIZER(prompt)["input_ids"])
        expected.append(sum(float(log_p[place - 1, tokens[place]]) for place in range(begin, len(tokens))))
    assert found.detail["log_likelihoods"] == pytest.approx(expected, rel=1e-4)
    best = max(range(3), key=expected.__getitem__)
    best_by_length = max(range(3), key=lambda place: expected[place] / len(CHOICES[place]))
    assert (found.right, found.said) == (best == right, CHOICES[best])
    assert found.detail["right_by_length"] == (best_by_length == right)
    shares = torch.tensor(expected).softmax(0)
    assert found.probability == pytest.approx(float(shares[right]), rel=1e-3)
    assert found.log_likelihood == pytest.approx(expected[right], rel=1e-4)
