"""Rows and batches of tokens."""

from __future__ import annotations

import pytest

from qstar.data import PadRight
from qstar.grid import Text


def test_labels_are_padded_and_other_columns_refused():
    batch = PadRight()([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    with pytest.raises(ValueError, match="rows hold 'text'"):
        PadRight()([{"input_ids": [5], "text": "a"}])


def test_padding_of_short_rows():
    batch = PadRight(9)([{"input_ids": [5, 6, 7], "position_ids": [0, 1, 2]}, {"input_ids": [8], "position_ids": [0]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert Text.from_inputs(**batch).targets.tolist() == [[6, 7, -100], [-100, -100, -100]]


def test_a_batch_has_at_least_the_length_that_is_asked_for():
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    for length, expected in ((0, 3), (2, 3), (5, 5)):
        batch = PadRight(9, length)(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9][:expected], [8, 9, 9, 9, 9][:expected]]
        assert batch["attention_mask"].sum(1).tolist() == [3, 1]
