"""Held-out log-likelihood, against plain passes of the model over every position and thought."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from math import exp, inf, nan
from statistics import mean

import pytest
import tiny
import torch

from qstar import reference
from qstar.data import PadRight
from qstar.evaluation import held_out
from qstar.evaluation.held_out import Difficulty, Evaluation, evaluate_rows
from qstar.evaluation.intervals import Interval, bootstrap
from qstar.evaluation.tables import evaluation_table, finite_or_none, table

ROWS = [tiny.text(1, length, seed)[0].tolist() for seed, length in enumerate((7, 4, 5))]


def plain_passes(model, rows):
    """Log-probabilities without and with thoughts, for each k in the order of the rows, and weights of the thoughts."""
    base, talk, weights = {0: [], 1: []}, {0: [], 1: []}, []
    edges = torch.tensor([model.qstar.start_token_id, model.qstar.end_token_id])
    for tokens in map(torch.tensor, rows):
        states = reference.hidden_states(model, tokens)
        for i in range(len(tokens) - 1):
            thought = tokens[:0]
            for _ in range(2):
                so_far = torch.cat([tokens[: i + 1], edges[:1], thought])
                said = reference.logits(model, reference.hidden_states(model, so_far)[-1]).argmax(-1, keepdim=True)
                thought = torch.cat([thought, said])
            whole = torch.cat([tokens[: i + 1], edges[:1], thought, edges[1:], tokens[i + 1 : i + 2]])
            after = reference.hidden_states(model, whole)
            for k in range(min(2, len(tokens) - 1 - i)):
                target, u, g = tokens[i + k + 1], states[i + k], after[i + 4 + k]
                mixed = reference.mix(model, u, g)
                base[k].append(reference.logits(model, u).log_softmax(-1)[target])
                talk[k].append(reference.logits(model, mixed).log_softmax(-1)[target])
                if k == 0:
                    weights.append(((mixed - u) @ (g - u)) / ((g - u) @ (g - u)))
    return base, talk, weights


@torch.no_grad()
def test_every_number_is_that_of_plain_passes():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2, rationales=2)
    found = evaluate_rows(model, [PadRight()([{"input_ids": row} for row in ROWS])])
    base, talk, weights = plain_passes(model, ROWS)
    means = {k: (-torch.stack(base[k]).mean().item(), -torch.stack(talk[k]).mean().item()) for k in (0, 1)}
    assert found.tokens == len(base[0]) == 13
    assert (found.nll_base, found.nll_talk) == pytest.approx(means[0], rel=1e-4)
    assert (found.nll_base_ahead[1], found.nll_talk_ahead[1]) == pytest.approx(means[1], rel=1e-4)
    assert found.mixing_weight == pytest.approx(torch.stack(weights).mean().item(), rel=1e-3)
    summary = found.summary()
    assert summary["gain"] == pytest.approx(means[0][0] - means[0][1], rel=1e-3)
    assert summary["perplexity_talk"] == pytest.approx(exp(found.nll_talk))


@torch.no_grad()
def test_tokens_by_difficulty_are_those_of_plain_passes(monkeypatch):
    """In bins that hold none, one and many, in two batches; a bound belongs to the bin above it."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2, rationales=2)
    base, talk, _ = plain_passes(model, ROWS)
    pairs = sorted((-float(without), -float(after)) for without, after in zip(base[0], talk[0], strict=True))
    bounds = (0.0, 0.5 * pairs[0][0], *((pairs[n - 1][0] + pairs[n][0]) / 2 for n in (1, 7)), inf)
    monkeypatch.setattr(held_out, "DIFFICULTIES", bounds)
    found = evaluate_rows(model, [PadRight()([{"input_ids": row} for row in rows]) for rows in (ROWS[:2], ROWS[2:])])
    assert [(each.least, each.below, each.tokens) for each in found.difficulties] == [
        (bounds[1], bounds[2], 1),
        (bounds[2], bounds[3], 6),
        (bounds[3], inf, 6),
    ]
    for each, part in zip(found.difficulties, (pairs[:1], pairs[1:7], pairs[7:]), strict=True):
        assert each.nll_base == pytest.approx(mean(without for without, _ in part), rel=1e-4)
        assert each.nll_talk == pytest.approx(mean(after for _, after in part), rel=1e-4)


def test_a_token_on_a_bound_and_one_beyond_every_bound_are_counted():
    log_base = -torch.tensor([[0.0, 0.5, 0.49, 8.0, inf, 3.0]])
    counts = torch.tensor([[True, True, True, True, True, False]])
    sums = held_out._sums_by_difficulty(counts, log_base, torch.zeros(1, 6))
    assert sums[0].tolist() == [1, 1, 1, 0, 0, 0, 2]
    assert sums[1].tolist() == pytest.approx([0, -0.49, -0.5, 0, 0, 0, -inf])


def test_tokens_by_difficulty_add_up_to_all_of_them():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    found = evaluate_rows(model, [PadRight()([{"input_ids": row}]) for row in ROWS])
    assert len(found.difficulties) > 2
    assert sum(each.tokens for each in found.difficulties) == found.tokens
    for name in ("nll_base", "nll_talk"):
        total = sum(each.tokens * getattr(each, name) for each in found.difficulties)
        assert total / found.tokens == pytest.approx(getattr(found, name))


def test_intervals_of_the_gain_draw_whole_rows():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    rows = [tiny.text(1, n, n)[0].tolist() for n in (9, 2, 5, 3, 12, 7)]
    found = evaluate_rows(model, [PadRight()([{"input_ids": row} for row in rows])], intervals=True)
    alone = [evaluate_rows(model, [PadRight()([{"input_ids": row}])]) for row in rows]
    for k, interval in enumerate(found.gain_intervals):
        counts = [len(row) - 1 - k for row in rows]
        gains = [
            count * (each.nll_base_ahead[k] - each.nll_talk_ahead[k]) for count, each in zip(counts, alone, strict=True)
        ]
        assert interval == pytest.approx(bootstrap(gains, counts=counts), rel=1e-4)
        assert interval.low < found.nll_base_ahead[k] - found.nll_talk_ahead[k] < interval.high
    assert replace(found, gain_intervals=()) == evaluate_rows(model, [PadRight()([{"input_ids": row} for row in rows])])


def test_intervals_of_several_processes_are_refused():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    with pytest.raises(ValueError, match="intervals are asked for of several processes"):
        evaluate_rows(model, [], total=lambda sums: sums, intervals=True)


def test_batches_and_padding_change_nothing():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    rows = [{"input_ids": tiny.text(1, length, length)[0].tolist()} for length in (8, 3, 6, 5)]
    together = evaluate_rows(model, [PadRight()(rows)])
    apart = evaluate_rows(model, [PadRight()([row]) for row in rows])
    assert together.tokens == apart.tokens
    assert together.nll_talk_ahead == pytest.approx(apart.nll_talk_ahead, rel=1e-5)
    assert together.nll_base_ahead == pytest.approx(apart.nll_base_ahead, rel=1e-5)


def test_sampled_thoughts_are_the_same_in_one_batch_and_in_two():
    """And rows that are alike have thoughts of their own."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    rows = [{"input_ids": tiny.text(1, 8)[0].tolist()}] * 2
    options = dict(temperature=1.0, seed=3)
    together = evaluate_rows(model, [PadRight()(rows)], **options)
    apart = evaluate_rows(model, [PadRight()([row]) for row in rows], **options)
    assert together.nll_talk_ahead == pytest.approx(apart.nll_talk_ahead, rel=1e-5)
    assert apart.nll_talk != pytest.approx(evaluate_rows(model, [PadRight()(rows[:1])], **options).nll_talk, rel=1e-4)


def test_evaluating_leaves_the_mode_alone():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1).train()
    evaluate_rows(model, [PadRight()([{"input_ids": [5, 6, 7]}])])
    assert model.training


def test_a_text_without_a_token_to_predict_is_refused():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    with pytest.raises(ValueError, match="dataset holds no token to predict"):
        evaluate_rows(model, [PadRight()([{"input_ids": [5]}])])


def test_processes_add_up_their_sums():
    """``total`` sees all that is averaged: two processes that evaluate half each find what one finds."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    halves = [[PadRight()([{"input_ids": tiny.text(1, n, n)[0].tolist()}])] for n in (8, 5)]
    seen = []
    for half in halves:
        evaluate_rows(model, half, total=lambda sums: seen.append(sums) or sums)
    whole = evaluate_rows(model, halves[0] + halves[1])
    assert evaluate_rows(model, halves[0], total=lambda sums: seen[0] + seen[1]) == whole


def test_the_table_shows_what_was_found():
    result = Evaluation(
        tokens=13,
        nll_base=2.5,
        nll_talk=2.25,
        nll_base_ahead=(2.5, 3.0),
        nll_talk_ahead=(2.25, 3.5),
        mixing_weight=0.125,
    )
    shown = evaluation_table(result).splitlines()
    assert shown[2].split() == ["1", "ahead", "-2.5000", "-2.2500", "+0.2500"]
    assert shown[3].split() == ["2", "ahead", "-3.0000", "-3.5000", "-0.5000"]
    assert shown[-1] == (
        "13 tokens predicted; mean mixing weight 0.125; perplexity 12.182 without and 9.488 with thoughts"
    )


def test_the_table_shows_intervals_and_difficulties_where_they_were_found():
    result = Evaluation(
        tokens=13,
        nll_base=2.5,
        nll_talk=2.25,
        nll_base_ahead=(2.5, 3.0, 1.0),
        nll_talk_ahead=(2.25, 3.5, 1.0),
        mixing_weight=0.125,
        difficulties=(Difficulty(0.5, 1.0, 3, 0.75, 0.875), Difficulty(8.0, inf, 10, 9.0, 8.5)),
        gain_intervals=(Interval(0.125, 0.375), Interval(-0.75, 0.25), Interval(nan, nan)),
    )
    shown = evaluation_table(result).splitlines()
    assert shown[6] == "95 % intervals of the gain, over rows: 1 ahead [+0.1250, +0.3750], 2 ahead [-0.7500, +0.2500]"
    assert shown[10].split() == ["0.5", "to", "1", "3", "-0.7500", "-0.8750", "-0.1250"]
    assert shown[11].split() == ["8", "and", "more", "10", "-9.0000", "-8.5000", "+0.5000"]
    assert max(map(len, shown[:12])) <= 100
    written = json.loads(json.dumps(finite_or_none(asdict(result)), allow_nan=False))
    assert written["difficulties"][1]["below"] is None and written["gain_intervals"][2] == [None, None]


def test_a_table_lines_its_columns_up():
    assert table(["name", "a"], [["x", "1.5"], ["longer", "10"]]).splitlines() == [
        "name      a",
        "------  ---",
        "x       1.5",
        "longer   10",
    ]


def test_what_is_not_a_number_in_json_is_null():
    record = {"loss": float("nan"), "parts": [float("inf"), 1.5], "step": 3, "more": {"x": -float("inf")}}
    assert finite_or_none(record) == {"loss": None, "parts": [None, 1.5], "step": 3, "more": {"x": None}}
    assert json.loads(json.dumps(finite_or_none(record), allow_nan=False))["step"] == 3


def test_a_perplexity_beyond_a_float_is_infinite_and_null_in_json():
    result = Evaluation(
        tokens=1,
        nll_base=800.0,
        nll_talk=1.0,
        nll_base_ahead=(800.0, float("nan")),
        nll_talk_ahead=(1.0, 1.0),
        mixing_weight=0.0,
    )
    summary = result.summary()
    assert (summary["perplexity_base"], summary["perplexity_talk"]) == (float("inf"), pytest.approx(exp(1)))
    assert "perplexity inf without" in evaluation_table(result)
    written = json.loads(json.dumps(finite_or_none({**summary, **asdict(result)}), allow_nan=False))
    assert (written["perplexity_base"], written["nll_base_ahead"]) == (None, [800.0, None])
