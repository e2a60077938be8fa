"""The layout of the grid and how a batch of text is read."""

from __future__ import annotations

import pytest
import torch

from qstar.grid import IGNORED, Text, ThoughtGrid

GRID = ThoughtGrid(positions=3, rationales=2, thought_tokens=2, ahead_tokens=3)


def test_sizes():
    assert (GRID.rationale_length, GRID.slots) == (6, 13)


def test_tokens_stand_where_they_should():
    text = torch.tensor([[10, 11, 12]])
    thoughts = torch.arange(100, 112).view(1, 3, 2, 2)
    tokens = GRID.tokens(text, thoughts, start=1, end=2).view(3, 13).tolist()
    assert tokens[0] == [10, 1, 100, 101, 2, 11, 12, 1, 102, 103, 2, 11, 12]
    assert tokens[1] == [11, 1, 104, 105, 2, 12, 12, 1, 106, 107, 2, 12, 12]
    assert tokens[2] == [12, 1, 108, 109, 2, 12, 12, 1, 110, 111, 2, 12, 12]


def test_positions_go_on_from_the_text():
    positions = GRID.position_ids(torch.tensor([[0, 1, 0]])).view(3, 13).tolist()
    assert positions[0] == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    assert positions[1] == [1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 6, 7]
    assert positions[2] == positions[0]


def test_split_by_role():
    hidden = torch.arange(3 * 13).view(1, 39, 1)
    text, policy, talk = GRID.split(hidden)
    assert text.flatten().tolist() == [0, 13, 26]
    assert policy[0, 1].flatten().tolist() == [14, 15, 20, 21]
    assert talk[0, 1].flatten().tolist() == [17, 18, 19, 23, 24, 25]


def test_a_thought_may_be_scored_on_one_token():
    grid = ThoughtGrid(2, 1, 1, 1)
    assert grid.tokens(torch.tensor([[7, 8]]), torch.tensor([[[[5]], [[6]]]]), 1, 2).tolist() == [
        [7, 1, 5, 2, 8, 1, 6, 2]
    ]


def test_plain_text():
    text = Text.from_inputs(torch.tensor([[5, 6, 7]]))
    assert text.positions.tolist() == [[0, 1, 2]]
    assert text.start is None
    assert text.targets.tolist() == [[6, 7, IGNORED]]
    assert text.talk_targets(GRID).tolist() == [[[6, 7, -100], [7, -100, -100], [-100, -100, -100]]]


def test_padding_on_either_side():
    ids = torch.tensor([[0, 0, 5, 6], [5, 6, 0, 0]])
    text = Text.from_inputs(ids, torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]))
    assert text.positions[0, 2:].tolist() == [0, 1]
    assert text.positions[1, :2].tolist() == [0, 1]
    assert text.start.tolist() == [[2, 2, 2, 2], [0, 0, 0, 0]]
    assert text.targets.tolist() == [[-100, -100, 6, -100], [6, -100, -100, -100]]


def test_packed_documents():
    text = Text.from_inputs(torch.tensor([[5, 6, 7, 8]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert text.start.tolist() == [[0, 0, 2, 2]]
    assert text.targets.tolist() == [[6, -100, 8, -100]]
    grid = ThoughtGrid(4, 1, 1, 2)
    assert text.talk_targets(grid).tolist() == [[[6, -100], [-100, -100], [8, -100], [-100, -100]]]


def test_ignored_labels():
    text = Text.from_inputs(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[-100, -100, 7]]))
    assert text.targets.tolist() == [[-100, 7, -100]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(input_ids=torch.zeros(3, dtype=torch.int64)), r"input_ids has shape \[3\]"),
        (
            dict(input_ids=torch.zeros(1, 3, dtype=torch.int64), labels=torch.zeros(1, 2, dtype=torch.int64)),
            r"labels has shape \[1, 2\], but it must be \[1, 3\]",
        ),
        (
            dict(input_ids=torch.zeros(2, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 1]])),
            "attention_mask has a hole in row 1",
        ),
        (
            dict(
                input_ids=torch.zeros(1, 3, dtype=torch.int64),
                attention_mask=torch.tensor([[0, 1, 1]]),
                position_ids=torch.tensor([[0, 1, 2]]),
            ),
            "position_ids reach back into the padding",
        ),
    ],
)
def test_wrong_batches_are_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        Text.from_inputs(**inputs)
