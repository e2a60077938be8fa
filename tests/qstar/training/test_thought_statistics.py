"""Whether thoughts are still of many kinds, against counting them one by one."""

from __future__ import annotations

import logging
from collections import Counter
from math import log
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_runs import QUIET, records, tiny_train, unequal_rows
from wait_watch import WaitWatch

from qstar.training.callbacks import CollapseWarning
from qstar.training.settings import QuietStarArguments
from qstar.training.thought_statistics import COLLAPSED, ThoughtStatistics, signs_of_collapse
from qstar.training.trainer import QuietStarTrainer

NAMES = tuple(COLLAPSED)


def by_hand(rows: list[list[tuple[int, ...]]]) -> dict[str, float]:
    """The statistics of thoughts, row by row."""
    every = [thought for row in rows for thought in row]
    tokens = Counter(token for thought in every for token in thought)
    total = sum(tokens.values())
    further = sum(len(thought) - 1 for thought in every)
    repeats = sum(token in thought[:place] for thought in every for place, token in enumerate(thought))
    return {
        "thought_entropy": -sum(n / total * log(n / total) for n in tokens.values()),
        "distinct_thoughts": sum(len(set(row)) for row in rows) / len(every),
        "thought_repetition": repeats / max(further, 1),
    }


def rows_of(thoughts: torch.Tensor, counted: torch.Tensor) -> list[list[tuple[int, ...]]]:
    """The thoughts that count, row by row."""
    return [
        [tuple(each.tolist()) for position in row[mask] for each in position]
        for row, mask in zip(thoughts, counted, strict=True)
    ]


@pytest.mark.parametrize(("batch", "positions", "rationales", "length"), [(1, 1, 1, 1), (3, 7, 2, 3), (2, 5, 1, 8)])
@pytest.mark.parametrize("vocabulary", [1, 3, 63])
def test_the_statistics_are_those_of_counting_by_hand(batch, positions, rationales, length, vocabulary):
    generator = torch.Generator().manual_seed(0)
    statistics, rows = ThoughtStatistics(), []
    for _ in range(3):
        thoughts = torch.randint(vocabulary, (batch, positions, rationales, length), generator=generator)
        counted = torch.rand(batch, positions, generator=generator) < 0.7
        counted[0, 0] = True
        statistics.add(thoughts, counted, vocabulary)
        rows += rows_of(thoughts, counted)
    assert statistics.summary() == pytest.approx(by_hand(rows), rel=1e-12)
    assert statistics.summary() == {}


def test_what_is_padding_counts_for_nothing():
    thoughts = torch.tensor([[[[5, 5]], [[6, 7]], [[8, 8]]]])
    statistics = ThoughtStatistics()
    statistics.add(thoughts, torch.tensor([[False, True, False]]), 9)
    assert statistics.summary() == pytest.approx(
        {"thought_entropy": log(2), "distinct_thoughts": 1.0, "thought_repetition": 0.0}
    )
    statistics.add(thoughts, torch.zeros(1, 3, dtype=torch.bool), 9)
    assert set(statistics.summary().values()) == {0.0}


def test_a_thought_and_its_tokens_in_another_order_are_two():
    thoughts = torch.tensor([[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 2, 3], [0, 0, 0], [0, 0, 1]])[None, :, None]
    statistics = ThoughtStatistics()
    statistics.add(thoughts, torch.ones(1, 6, dtype=torch.bool), 4)
    found = statistics.summary()
    assert found["distinct_thoughts"] == pytest.approx(5 / 6)
    assert found["thought_repetition"] == pytest.approx(3 / 12)


def test_counts_of_processes_are_added():
    thoughts, counted = torch.randint(6, (4, 5, 2, 3)), torch.ones(4, 5, dtype=torch.bool)
    whole, first, second = (ThoughtStatistics() for _ in range(3))
    whole.add(thoughts, counted, 6)
    first.add(thoughts[:3], counted[:3], 6)
    second.add(thoughts[3:], counted[3:], 6)
    of_second = []
    second.summary(lambda counts: of_second.append(counts) or counts)
    assert first.summary(lambda counts: counts + of_second[0]) == whole.summary()


def test_the_host_never_waits_while_thoughts_are_counted():
    thoughts, counted = torch.randint(6, (4, 5, 2, 3)), torch.ones(4, 5, dtype=torch.bool)
    statistics = ThoughtStatistics()
    with WaitWatch() as watch:
        statistics.add(thoughts, counted, 6)
        statistics.add(thoughts, counted, 6)
    assert watch.waits == []


@pytest.mark.parametrize("size", [4, 1])
def test_the_log_has_the_statistics_of_all_thoughts_since_the_last(size, tmp_path):
    """However the rows are split into batches, the short one that is padded included."""
    taken = []

    class Taking(QuietStarTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss, output = super().compute_loss(model, inputs, return_outputs=True)
            mask = inputs["attention_mask"].bool()
            taken.extend(rows_of(output.thoughts, mask))
            return loss

    rows = unequal_rows()
    rows[2] = {name: values[:5] for name, values in rows[2].items()}
    options = QUIET | dict(max_steps=4, logging_steps=2, train_sampling_strategy="sequential", learning_rate=0.0)
    args = QuietStarArguments(
        str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, **options
    )
    Taking(tiny.thinking_model(thought_tokens=3, ahead_tokens=2), args, train_dataset=rows).train()
    logged = [record for record in records(tmp_path) if "loss" in record]
    assert len(logged) == 2 and len(taken) == 16
    for record, part in zip(logged, (taken[:8], taken[8:]), strict=True):
        assert {name: record[name] for name in NAMES} == pytest.approx(by_hand(part), rel=1e-9)
    assert len({len(row) for row in taken}) == 2


def test_each_sign_of_a_collapse_is_told_by_its_bound():
    healthy = {"thought_entropy": 2.0, "distinct_thoughts": 0.5, "thought_repetition": 0.4, "loss": 0.0}
    assert signs_of_collapse(healthy) == [] and signs_of_collapse({}) == []
    for name, (bound, side) in COLLAPSED.items():
        assert signs_of_collapse(healthy | {name: bound}) == []
        beyond = bound + (0.01 if side == "above" else -0.01)
        assert signs_of_collapse(healthy | {name: beyond}) == [f"{name} is {beyond:.3f}, {side} {bound}"]


def test_a_collapse_is_warned_of_once_and_by_one_process(caplog):
    callback, state = CollapseWarning(), SimpleNamespace(global_step=7, is_world_process_zero=True)
    callback.on_log(None, state, None, logs={"thought_entropy": 2.0})
    assert caplog.text == ""
    callback.on_log(None, SimpleNamespace(global_step=7, is_world_process_zero=False), None, logs={NAMES[0]: 0.1})
    assert caplog.text == ""
    for _ in range(2):
        callback.on_log(None, state, None, logs={"thought_entropy": 0.1, "thought_repetition": 0.99})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "thoughts have collapsed by step 7: thought_entropy is 0.100, below 0.5, thought_repetition is 0.990, above "
        "0.9; try a lower policy_weight or learning_rate, an entropy_weight, or a higher thought_temperature"
    )


def test_a_run_whose_thoughts_are_all_the_same_is_warned_of(tmp_path, caplog):
    """A model that says one word, whatever it reads."""
    model = tiny.plain_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    options = dict(model=model, thought_tokens=8, thought_temperature=0.0, learning_rate=0.0)
    tiny_train(tmp_path / "a", logging_steps=1, **options)
    [record] = [r for r in caplog.records if "collapsed" in r.getMessage()]
    assert "thought_entropy is 0.000, below 0.5" in record.getMessage()
    caplog.clear()
    tiny_train(tmp_path / "b", logging_steps=1)
    assert "collapsed" not in caplog.text
