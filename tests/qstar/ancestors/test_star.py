"""STaR against a model whose words are scripted: what is kept, what is trained on, from which weights, and how long."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from scripted_star import HELD_OUT, QUESTIONS, SAID, Script, question, run, weights_of
from transformers import AutoModelForCausalLM

from qstar.ancestors import rounds as module
from qstar.ancestors.fine_tuning import fine_tune


@pytest.fixture
def script(monkeypatch):
    return Script(monkeypatch, lambda prompt, weights: SAID[prompt])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rationales_are_kept_that_reach_the_answer_and_failures_are_asked_again_with_it(script, tmp_path):
    result = run(tmp_path)
    assert [prompt for prompt, _ in script.asked] == [
        *("a b q", "b c q", "c d q", "d e q", "e f q"),
        *("h d b c q", "h e c d q", "h f d e q"),
    ]
    assert [(each["prompt"], each["completion"], each["rationalised"]) for each in lines(_rationales(tmp_path))] == [
        ("a b q", " m z c", False),
        ("e f q", " m n z g", False),
        ("b c q", " n z d", True),
    ]
    [done] = result.rounds
    assert (done.solved, done.rationalised, done.steps, done.right) == (2, 1, 2, None)
    said = lines(tmp_path / "run" / "round-01" / "attempts.jsonl")
    assert [each["answer"] for each in said] == ["c", "m", None, "m", "g"]


def test_without_rationalisation_no_prompt_has_a_hint(script, tmp_path):
    result = run(tmp_path, rationalise=False)
    assert [prompt for prompt, _ in script.asked] == [f"{each.text} q" for each in QUESTIONS]
    assert (result.rounds[0].solved, result.rounds[0].rationalised) == (2, 0)


def test_neither_a_hint_nor_an_exemplar_reaches_the_text_that_is_trained_on(monkeypatch, tmp_path):
    exemplars = [question("x y", "y", rationale="p p")]
    before = {False: "x y q p p z y e ", True: "h y x y q p p z y e "}

    def says(prompt, weights):
        start = before[prompt.startswith("h")]
        assert prompt.startswith(start)
        return SAID[prompt.removeprefix(start)]

    script, trained = Script(monkeypatch, says), []

    def spied(original, tokenizer, rows, *others):
        trained.extend(rows)
        return fine_tune(original, tokenizer, rows, *others)

    monkeypatch.setattr(module, "fine_tune", spied)
    run(tmp_path, exemplars=exemplars)
    assert any(prompt.startswith("h") for prompt, _ in script.asked)
    decode = tiny.tokenizer().decode
    assert [decode(row["input_ids"]) for row in trained] == [
        "a b q m z c <eos>",
        "e f q m n z g <eos>",
        "b c q n z d <eos>",
    ]
    for row in trained:
        assert row["labels"] == [-100] * 3 + row["input_ids"][3:], "rationale and answer are learned, the question not"


def test_every_round_trains_from_the_original_weights(script, tmp_path):
    """The same rationales and as many steps give the same weights; trained on from the last round they would not."""
    model = tiny.plain_model("llama")
    before = weights_of(model)
    result = run(tmp_path, model=model, rounds=3, growth=1.0, held_out=HELD_OUT, patience=3)
    assert [each.loss for each in result.rounds] == [result.rounds[0].loss] * 3
    weights = {prompt: [] for prompt, _ in script.asked}
    for prompt, asked in script.asked:
        weights[prompt].append(asked)
    assert weights["a b q"][0] == before, "the first round asks the original model"
    assert weights["a b q"][1] == weights["a b q"][2] == weights["u v q"][1] != before
    assert weights["u v q"] == [before, *[weights["a b q"][1]] * 3]
    assert weights_of(model) == before


def test_steps_grow_by_a_fifth_and_the_learning_rate_stays_after_the_warm_up(script, tmp_path, monkeypatch):
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spied(optimizer, *args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spied)
    result = run(tmp_path, rounds=3, first_steps=5, warmup_steps=4)
    assert [each.steps for each in result.rounds] == [5, 6, 7]
    assert rates[5:11] == pytest.approx([0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_the_loss_is_that_of_rationales_and_answers_alone(script, tmp_path):
    """By plain logits of the original model, over the three texts of the first step."""
    result = run(tmp_path, first_steps=1, train_batch_size=3)
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    losses = []
    for text in ("a b q m z c <eos>", "e f q m n z g <eos>", "b c q n z d <eos>"):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
        losses += [-log_probs[place - 1, ids[place]] for place in range(3, len(ids))]
    assert result.rounds[0].loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_it_stops_when_nothing_is_gained_and_leaves_the_best_round(monkeypatch, tmp_path, capsys):
    """The second round is the best; two further ones gain nothing."""
    seen: list[str] = []

    def says(prompt, weights):
        if prompt in ("u v q", "v w q"):
            if weights not in seen:
                seen.append(weights)
            right = {1: 0, 2: 1, 3: 2}.get(len(seen), 1)
            return "z " + {"u v q": "w" if right > 0 else "m", "v w q": "x" if right > 1 else "m"}[prompt]
        return SAID[prompt]

    Script(monkeypatch, says)
    result = run(tmp_path, rounds=9, held_out=HELD_OUT, patience=2, first_steps=1, growth=2.0)
    assert (result.before, [each.right for each in result.rounds], result.best) == (0, [1, 2, 1, 1], 2)
    assert weights_of(result.model) == weights_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run")) == seen[2]
    assert list((tmp_path / "run").glob("round-*/model")) == []
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["before"], report["best"], len(report["rounds"])) == (0, 2, 4)
    assert "round 2: 2 of 5 solved and 1 more with a hint, 2 steps; held out 100.0%" in capsys.readouterr().out
    first, _, *rows = result.table().splitlines()
    assert first.split("  ")[0] == "round" and rows[2].split()[:7] == ["2", "(best)", "2", "of", "5", "1", "3"]


def test_a_later_round_that_solves_nothing_ends_it(monkeypatch, tmp_path, caplog):
    original = weights_of(tiny.plain_model("llama"))
    Script(monkeypatch, lambda prompt, weights: SAID[prompt] if weights == original else "m")
    result = run(tmp_path, rounds=5)
    assert len(result.rounds) == result.best == 1
    assert "round 2 solves no question any more" in caplog.text


def test_what_is_right_may_be_judged_otherwise(script, tmp_path):
    """Here whatever is said to one question, and nothing else."""
    result = run(tmp_path, is_right=lambda answer, question: question.text == "b c", rationalise=False)
    assert result.rounds[0].solved == 1
    assert [each["completion"] for each in lines(tmp_path / "run/round-01/rationales.jsonl")] == [" m z m"]


def _rationales(tmp_path):
    return tmp_path / "run" / "round-01" / "rationales.jsonl"
