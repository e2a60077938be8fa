"""Two models beside each other: every number against simple loops, and what cannot be compared is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from statistics import fmean

import inspected
import pytest
import tiny

import qstar
from qstar.evaluation.intervals import bootstrap
from qstar.inspection.comparison import Comparison, check_same_tokens, compare, largest_differences, paired
from qstar.inspection.data import Inspection


def values(found, name):
    """By document, of the next token at each position."""
    return [[getattr(each, name)[0] for each in document.positions] for document in found.documents]


@pytest.mark.parametrize("name", ["talk_log_prob", "base_log_prob", "gain"])
def test_differences_are_those_of_the_next_tokens_over_documents(compared, name):
    taken = "gain_ahead" if name == "gain" else name
    first, second = values(compared.first, taken), values(compared.second, taken)
    assert compared.tokens == sum(map(len, first)) == sum(map(len, second)) == 17
    differences = []
    for ours, theirs in zip(first, second, strict=True):
        differences.append([theirs[i] - ours[i] for i in range(len(ours))])
    found = getattr(compared, name)
    assert found.first == pytest.approx(fmean(chain(*first)))
    assert found.second == pytest.approx(fmean(chain(*second)))
    assert found.difference.mean == pytest.approx(found.second - found.first)
    interval = bootstrap([sum(each) for each in differences], counts=[len(each) for each in differences])
    assert (found.difference.low, found.difference.high) == tuple(interval)
    assert found.difference.low < found.difference.mean < found.difference.high


def test_both_sides_are_those_of_their_own_summaries(compared):
    for side in ("first", "second"):
        summary = getattr(compared, side).summary
        assert getattr(compared.base_log_prob, side) == pytest.approx(summary.base_log_prob)
        assert getattr(compared.gain, side) == pytest.approx(summary.gain.mean)
        talk = summary.base_log_prob + summary.gain.mean
        assert getattr(compared.talk_log_prob, side) == pytest.approx(talk)


def test_repaired_and_broken_are_of_the_second_against_the_first_after_the_first_rationale():
    letters = [" ".join(tiny.WORDS[token] for token in tiny.text(1, 60, seed)[0].tolist()) for seed in range(3)]
    found = [
        qstar.inspect(tiny.thinking_model("llama", seed=seed), tiny.tokenizer(), letters, controls=False)
        for seed in (0, 5)
    ]
    repaired = broken = 0
    for document, other in zip(found[0].documents, found[1].documents, strict=True):
        for first, second in zip(document.positions, other.positions, strict=True):
            token = document.token_ids[first.index + 1]
            was, now = (each.after[0].token_id == token for each in (first, second))
            repaired += now and not was
            broken += was and not now
    comparison = compare(*found)
    assert (comparison.repaired, comparison.broken) == (repaired, broken)
    assert repaired != broken and repaired and broken
    turned = compare(*found[::-1])
    assert (turned.repaired, turned.broken) == (broken, repaired)
    assert turned.gain.difference.mean == pytest.approx(-comparison.gain.difference.mean)


def test_a_model_beside_itself_differs_in_nothing(compared):
    same = compare(compared.first, compared.first)
    for each in (same.talk_log_prob, same.base_log_prob, same.gain):
        assert (each.difference.mean, each.difference.low, each.difference.high) == (0, 0, 0)
        assert each.first == each.second
    assert (same.repaired, same.broken) == (0, 0)
    assert largest_differences(same, 5) == ([], [])


def test_the_largest_differences_come_first_on_both_sides(compared):
    pairs = [pair for some in paired(compared.first, compared.second) for pair in some]
    differences = sorted(pair.talk_log_prob for pair in pairs)
    best, worst = largest_differences(compared, 3)
    assert [each.talk_log_prob for each in best] == differences[::-1][:3]
    assert [each.talk_log_prob for each in worst] == differences[:3]
    assert differences[2] < 0 < differences[-3]
    for each in (*best, *worst):
        assert each.document is compared.first.documents[each.number]
        for side in ("first", "second"):
            document = getattr(compared, side).documents[each.number]
            assert any(getattr(each, side) is position for position in document.positions)
        assert each.first.index == each.second.index
        assert each.talk_log_prob == each.second.talk_log_prob[0] - each.first.talk_log_prob[0]
        assert each.base_log_prob == each.second.base_log_prob[0] - each.first.base_log_prob[0]
        assert each.gain == each.second.gain - each.first.gain
        assert each.gain == pytest.approx(each.talk_log_prob - each.base_log_prob, abs=1e-5)
    assert largest_differences(compared, 0) == ([], [])


def test_the_gains_of_single_rationales_have_the_gain_for_their_mean(compared):
    for document in compared.second.documents:
        for each in document.positions:
            expected = [rationale.talk_log_prob[0] - each.base_log_prob[0] for rationale in each.rationales]
            assert each.own_gains == expected
            assert fmean(each.own_gains) == pytest.approx(each.gain)


def test_tokens_that_only_one_predicts_are_in_no_difference(compared):
    second = replace(compared.second)
    first, *rest = second.documents
    second.documents = [replace(first, positions=[replace(first.positions[0]), *first.positions[2:]]), *rest]
    second.documents[0].positions[0].base_log_prob = [None, -1.0, None]
    some = compare(compared.first, second)
    assert some.tokens == 15
    assert [pair.first.index for pair in paired(some.first, some.second)[0]] == [2, 3, 4, 5]
    kept = [values(each, "talk_log_prob") for each in (compared.first, compared.second)]
    differences = [b - a for ours, theirs in zip(*kept, strict=True) for a, b in zip(ours, theirs, strict=True)][2:]
    assert some.talk_log_prob.difference.mean == pytest.approx(fmean(differences))


def test_json_gives_back_every_value(compared):
    text = compared.to_json()
    assert Comparison.from_json(text) == compared
    assert Comparison.from_json(text).to_json() == text
    assert compare(*(Inspection.from_json(each.to_json()) for each in (compared.first, compared.second))) == compared
    read = json.loads(text)
    assert read["schema"] == 1
    assert read["talk_log_prob"]["difference"]["mean"] == compared.talk_log_prob.difference.mean
    assert read["second"]["model"] == "another/model"


def test_one_kind_of_file_is_not_read_as_the_other(compared):
    with pytest.raises(ValueError, match=r"comparison lacks or has too much: .*it must have first, second"):
        Comparison.from_json(compared.first.to_json())
    with pytest.raises(ValueError, match="inspection lacks or has too much"):
        Inspection.from_json(compared.to_json())
    with pytest.raises(ValueError, match="this is not the JSON of a comparison: it has no schema"):
        Comparison.from_json("{}")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a b c d e f", "g h i k", "n o p q"], "text 2 is not the same tokens to both models, from token 4 on"),
        (["a b c d e f", "g h i j k l m"], "text 3 is not the same tokens to both models, from token 1 on"),
        (["a b c d e"], "text 1 is not the same tokens to both models, from token 6 on"),
    ],
    ids=["another token", "no third text", "shorter"],
)
def test_other_texts_are_refused_with_their_number(compared, texts, message):
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    other = qstar.inspect(model, tiny.tokenizer(), texts, controls=False)
    with pytest.raises(ValueError, match=message):
        compare(compared.first, other)


def test_the_same_numbers_for_other_texts_are_refused(compared):
    second, document = compared.second, compared.second.documents[1]
    documents = [second.documents[0], replace(document, tokens=["X", *document.tokens[1:]]), second.documents[2]]
    with pytest.raises(ValueError, match="text 2 is not the same tokens to both models, from token 1 on"):
        compare(compared.first, replace(second, documents=documents))


def test_parts_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="seq_length is 256 of the first and 4 of the second: it must be the same"):
        inspected.compared(seq_length=4)


def test_nothing_that_both_predict_is_refused(compared):
    documents = [replace(each, positions=[]) for each in compared.second.documents]
    with pytest.raises(ValueError, match="texts hold no token to predict"):
        compare(compared.first, replace(compared.second, documents=documents))


def test_the_same_tokens_pass():
    check_same_tokens([[1, 2], []], [[1, 2], []])
