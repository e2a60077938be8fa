"""Every token of held-out text, against what the evaluation adds up and against scores of continuations."""

from __future__ import annotations

import pytest
import tiny
import torch

from qstar.data import PadRight
from qstar.evaluation import controls
from qstar.evaluation.held_out import evaluate_rows
from qstar.evaluation.scoring import Request, score_requests
from qstar.evaluation.text_scores import score_text

ROWS = [tiny.text(1, length, seed)[0].tolist() for seed, length in enumerate((7, 4, 5))]
BATCHES = [PadRight()([{"input_ids": row} for row in rows]) for rows in (ROWS[:2], ROWS[2:])]


@pytest.fixture(scope="module")
def model():
    return tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=3, rationales=2)


def test_tokens_add_up_to_the_means_of_the_evaluation(model):
    found, whole = score_text(model, BATCHES), evaluate_rows(model, BATCHES)
    assert found.row.tolist() == [0] * 6 + [1] * 3 + [2] * 4
    assert -found.without.mean().item() == pytest.approx(whole.nll_base, rel=1e-5)
    assert -found.after.mean().item() == pytest.approx(whole.nll_talk, rel=1e-5)
    assert not torch.allclose(found.after, found.without, atol=1e-3)


@pytest.mark.parametrize("limit", [None, 16])
def test_a_token_is_as_probable_as_a_continuation_of_its_text(model, limit):
    """Also where the grid is read in parts."""
    found = score_text(model, BATCHES, max_grid_tokens=limit)
    requests = [Request(row[:end], row[end : end + 1]) for row in ROWS for end in range(1, len(row))]
    scores = dict(score_requests(model, requests))
    expected = torch.cat([scores[number].log_prob for number in range(len(requests))])
    torch.testing.assert_close(found.after, expected, rtol=1e-5, atol=1e-5)
    thoughts = [thought for row in found.thoughts for thought in row[:-1].tolist()]
    assert thoughts == [scores[number].thoughts[0].tolist() for number in range(len(requests))]


def test_without_thoughts_the_same_is_found_and_nothing_is_thought(model):
    found = score_text(model, BATCHES, thoughts=None)
    torch.testing.assert_close(found.without, score_text(model, BATCHES).without, rtol=1e-5, atol=1e-5)
    assert found.after is None and found.thoughts == []


def test_given_thoughts_are_read_in_the_place_of_its_own(model):
    own = score_text(model, BATCHES)
    again = score_text(model, BATCHES, thoughts=own.thoughts)
    torch.testing.assert_close(again.after, own.after, rtol=1e-5, atol=1e-5)
    shapes = [(len(row), 3) for row in ROWS]
    drawn = controls.random_tokens(model, tiny.tokenizer(), shapes, seed=0)
    other = score_text(model, BATCHES, thoughts=drawn)
    assert [each.tolist() for each in other.thoughts] == [each.tolist() for each in drawn]
    requests = [Request(row[:end], row[end : end + 1]) for row in ROWS for end in range(1, len(row))]
    given = [thought[None] for row in drawn for thought in row[:-1]]
    scores = dict(score_requests(model, requests, thoughts=given))
    expected = torch.cat([scores[number].log_prob for number in range(len(requests))])
    torch.testing.assert_close(other.after, expected, rtol=1e-5, atol=1e-5)


def test_thoughts_that_do_not_fit_the_rows_are_refused(model):
    own = score_text(model, BATCHES).thoughts
    with pytest.raises(ValueError, match=r"row 1 have shape \[3, 2\].*L = 4"):
        score_text(model, BATCHES, thoughts=[own[0], own[1][:3], own[2]])
    with pytest.raises(ValueError, match="given for 2 rows, but there are at least 3"):
        score_text(model, BATCHES, thoughts=own[:2])
    with pytest.raises(ValueError, match="given for 4 rows, but there are 3"):
        score_text(model, BATCHES, thoughts=[*own, own[0]])
    with pytest.raises(ValueError, match="there must be text"):
        score_text(model, [])
