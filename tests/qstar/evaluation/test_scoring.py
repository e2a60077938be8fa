"""Scores of continuations, against a plain pass of the model for every token and thought."""

from __future__ import annotations

import pytest
import tiny
import torch
from plain_answers import greedy_thought

from qstar import reference
from qstar.evaluation.scoring import Request, encode, score_requests

REQUESTS = [
    Request([5, 9, 11, 4, 20], [7, 8]),
    Request([6], [12, 13, 14]),
    Request([8, 8, 21], [9]),
    Request([29, 4, 5, 6, 7, 10, 11], [15, 16, 17, 9]),
]


def plain_log_probs(model, request, thought_of):
    """``[L, V]``, and the thoughts that ``thought_of`` says of each text and number of a token."""
    rows, thoughts = [], []
    edges = [model.qstar.start_token_id, model.qstar.end_token_id]
    for place in range(len(request.continuation)):
        text = torch.tensor(request.context + request.continuation[:place])
        state = reference.hidden_states(model, text)[-1]
        if (thought := thought_of(text, place)) is not None:
            whole = torch.cat([text, torch.tensor(edges[:1]), thought, torch.tensor(edges[1:])])
            state = reference.mix(model, state, reference.hidden_states(model, whole)[-1])
            thoughts.append(thought)
        rows.append(model.language_head().logits(state).log_softmax(-1))
    return torch.stack(rows), torch.stack(thoughts) if thoughts else None


def check(scores, expected, thoughts, request, permitted=None):
    target = torch.tensor(request.continuation)
    rows = torch.arange(len(target))
    torch.testing.assert_close(scores.log_prob, expected[rows, target], rtol=1e-4, atol=1e-5)
    assert torch.equal(scores.best, expected.argmax(-1) == target)
    if permitted is None:
        assert torch.equal(scores.top, expected.argmax(-1))
        assert torch.equal(scores.permitted_log_prob, scores.log_prob)
        assert torch.equal(scores.permitted_best, scores.best)
    assert (scores.thoughts is None) == (thoughts is None)
    if thoughts is not None:
        assert torch.equal(scores.thoughts, thoughts)


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_those_of_plain_passes(family, batch_size):
    model = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=2, rationales=2)
    given = [tiny.text(len(each.continuation), 5, seed=number) for number, each in enumerate(REQUESTS)]
    kinds = {
        "own": ("own", lambda number: lambda text, place: greedy_thought(model, text)),
        "none": (None, lambda number: lambda text, place: None),
        "given": (given, lambda number: lambda text, place: given[number][place]),
    }
    found = {}
    for name, (thoughts, thought_of) in kinds.items():
        found[name] = dict(score_requests(model, REQUESTS, thoughts=thoughts, batch_size=batch_size))
        assert sorted(found[name]) == list(range(len(REQUESTS)))
        for number, request in enumerate(REQUESTS):
            check(found[name][number], *plain_log_probs(model, request, thought_of(number)), request)
    assert not torch.allclose(found["own"][0].log_prob, found["none"][0].log_prob)
    assert not torch.allclose(found["own"][0].log_prob, found["given"][0].log_prob)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "qwen2"])
def test_a_model_that_never_learned_to_think_is_scored_by_its_own_pass(family):
    model = tiny.plain_model(family)
    for number, scores in score_requests(model, REQUESTS, thoughts=None, batch_size=3):
        request = REQUESTS[number]
        logits = model(torch.tensor([request.tokens])).logits[0, -len(request.continuation) :]
        check(scores, logits.log_softmax(-1), None, request)


@torch.no_grad()
def test_only_permitted_tokens_share_the_mass():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    permitted = [7, 8, 13, 9, 9]
    for number, scores in score_requests(model, REQUESTS, permitted=permitted):
        request = REQUESTS[number]
        expected, thoughts = plain_log_probs(model, request, lambda text, place: greedy_thought(model, text))
        check(scores, expected, thoughts, request, permitted)
        for place, token in enumerate(request.continuation):
            p = expected[place].exp()
            among = p[[7, 8, 9, 13]]
            best = [7, 8, 9, 13][int(among.argmax())]
            assert scores.top[place] == best
            if token in permitted:
                assert scores.permitted_log_prob[place].exp() == pytest.approx(float(p[token] / among.sum()), rel=1e-4)
                assert bool(scores.permitted_best[place]) == (best == token)
            else:
                assert scores.permitted_log_prob[place] == 0 and scores.permitted_best[place]


@torch.no_grad()
def test_sampled_thoughts_depend_on_the_text_the_seed_and_the_repeat_alone():
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=1)

    def thoughts(requests=REQUESTS, **options):
        found = dict(score_requests(model, requests, **(dict(temperature=1.0) | options)))
        return [found[number].thoughts for number in range(len(requests))]

    first = thoughts(batch_size=1)
    for other in (thoughts(batch_size=4), thoughts(REQUESTS[::-1])[::-1]):
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
    for options in (dict(seed=1), dict(repeat=1), dict(temperature=0.0)):
        assert not all(torch.equal(x, y) for x, y in zip(first, thoughts(**options), strict=True))


@torch.no_grad()
def test_thoughts_are_those_of_generate():
    """With the same seed, behind the same text; the token that follows is the most probable one there."""
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=1)
    context = REQUESTS[0].context
    options = dict(think=True, thought_temperature=1.0, thought_seed=5, max_new_tokens=3, do_sample=False, drafts=0)
    output = model.generate(
        torch.tensor([context]), return_dict_in_generate=True, output_thoughts=True, pad_token_id=0, eos_token_id=None,
        **options,
    )  # fmt: skip
    said = output.sequences[0, len(context) :].tolist()
    [(_, scores)] = score_requests(model, [Request(context, said)], temperature=1.0, seed=5)
    assert torch.equal(scores.thoughts, output.thoughts[0])
    assert scores.best.all() and scores.top.tolist() == said


@torch.no_grad()
@pytest.mark.parametrize("thinks", [True, False])
def test_choices_of_one_token_behind_the_same_question_are_read_once(thinks):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1) if thinks else tiny.plain_model("llama")
    choices = [Request([5, 9, 11], [token]) for token in (7, 8, 13)]
    others = [Request([5, 9], [11]), Request([5, 9], [11, 7])]  # the second reads the tokens of the choices
    rows = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["inputs_embeds" if thinks else "input_ids"].shape[0]),
        with_kwargs=True,
    )
    found = dict(score_requests(model, [*choices, *others], thoughts="own" if thinks else None))
    hook.remove()
    assert set(rows) == {3}, "of five requests"
    for number, request in enumerate([*choices, *others]):
        [(_, alone)] = score_requests(model, [request], thoughts="own" if thinks else None)
        torch.testing.assert_close(found[number].log_prob, alone.log_prob, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_scored_is_refused():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    plain = tiny.plain_model("llama")

    def refused(what, *arguments, **options):
        with pytest.raises(ValueError, match=what):
            list(score_requests(*arguments, **options))

    refused("thoughts are asked for, but LlamaForCausalLM never learned to think", plain, REQUESTS)
    refused("request 1 has an empty context", model, [REQUESTS[0], Request([], [4])])
    refused("request 0 has an empty continuation", model, [Request([4], [])])
    refused("batch_size is 0, but it must be at least 1", model, REQUESTS, batch_size=0)
    refused("thoughts are given for 1 requests, but there are 4", model, REQUESTS, thoughts=[tiny.text(2, 3)])
    longer = [tiny.text(len(each.continuation) + 1, 3) for each in REQUESTS]
    shape = r"thoughts of request 0 have shape \[3, 3\], but it must be \[L, K\] with L = 2"
    refused(shape, model, REQUESTS, thoughts=longer)
    refused("max_position_embeddings = 128", model, [Request([4] * 126, [5])])


def test_context_and_continuation_are_read_as_one_text():
    tokenizer = tiny.tokenizer()
    assert encode(tokenizer, "a b", " c d") == Request([4, 5], [6, 7])
    assert encode(tokenizer, "a b ", "c") == Request([4, 5], [6])
    for context, continuation, name in (("", " a", "context ''"), ("a", "", "continuation ''")):
        with pytest.raises(ValueError, match=f"{name} has no tokens"):
            encode(tokenizer, context, continuation)
