"""One setting at a time, and rewards by noise: what is changed, what is measured, and what tables make of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import ablations
import ladder
import noise_rewards
from common import jobs
from common.answers import OWN_THOUGHTS
from common.jobs import result_path
from common.seeds import over_seeds
from qstar.embedded.pretrain import PretrainSettings
from qstar.learning import PAPER
from qstar.wrapping import wrap
from tasks.every import TASKS

TINY = PretrainSettings(
    width=16, layers=1, heads=2, key_value_heads=1, intermediate=16, batch_size=8, max_steps=2, tried=8, goal=0.0
)


@pytest.fixture(autouse=True)
def tiny(tmp_path_factory, monkeypatch):
    """The rung of digits with a tiny decoder, and a cache of its own."""
    monkeypatch.setitem(TASKS, "digits", replace(TASKS["digits"], pretraining=TINY, training=dict(seq_length=16)))
    monkeypatch.setattr(jobs, "CACHE", tmp_path_factory.mktemp("cache"))


def asked(*flags):
    return ablations.jobs(ablations.parser().parse_args(["digits", *flags]))


def differences(one, other):
    """Names and values of settings in which ``one`` differs from ``other``."""
    return {
        name: value
        for part in ("thoughts", "training")
        for name, value in one.settings[part].items()
        if other.settings[part].get(name) != value
    }


OTHER_RULE = {
    "paper": ("advantages-signed-temperature-1", dict(signed_advantages=True, reinforce_temperature=1.0)),
    "rlp": ("advantages-clamped-temperature-3", dict(signed_advantages=False, reinforce_temperature=3.0)),
}


@pytest.mark.parametrize("preset", ladder.PRESETS)
def test_a_change_is_of_one_setting(preset):
    default, *others = asked("--seeds", "0", "--preset", preset)
    assert default.name == "default" and default.training == ladder.PRESETS[preset]
    changed = {each.name: differences(each, default) for each in others}
    assert len(changed) == len(others)
    name, values = OTHER_RULE[preset]
    assert changed.pop(name) == values
    assert changed.pop("mixing-weight-always-1") == dict(mixing_head=False, mixing_head_lr_factor=1.0)
    assert changed.pop("start-and-end-tokens-mean-of-the-vocabulary") == dict(start_init=None, end_init=None)
    assert all(len(each) == 1 for each in changed.values()), changed
    assert changed["policy-weight-100"] == dict(policy_weight=100.0)
    assert changed["thought-tokens-8"] == dict(thought_tokens=8)
    assert changed["mixing-weight-sigmoid"] == dict(sigmoid=True)


@pytest.mark.parametrize(
    ("preset", "own", "others"),
    [
        ("paper", ["baseline-mean", "advantages-clamped", "policy-weight-30"], ["advantages-signed"]),
        ("rlp", ["baseline-leave_one_out", "advantages-signed", "policy-weight-10"], ["advantages-clamped"]),
    ],
)
def test_what_a_preset_is_already_is_no_change(preset, own, others):
    names = {each.name for each in asked("--preset", preset)}
    assert names.isdisjoint(own) and names.issuperset(others)


def test_flags_set_what_is_the_same_for_all_but_for_the_change():
    flags = ["--preset", "paper", "--seeds", "0", "--set", "policy_weight=3", "optim=sgd"]
    found = {each.name: each.training for each in asked(*flags)}
    assert found["default"] == dict(preset="paper", policy_weight=3, optim="sgd")
    assert found["policy-weight-10"] == dict(preset="paper", policy_weight=10.0, optim="sgd")


def test_the_command_leaves_a_table(tmp_path, monkeypatch, capsys):
    some = [each for each in ablations.changes("digits", "rlp") if each.factor in ("default", "mixing weight")]
    monkeypatch.setattr(ablations, "changes", lambda rung, preset: some)
    flags = ["digits", "--seeds", "0", "--problems", "8"]
    flags += ["--set", "max_steps=1", "per_device_train_batch_size=2", "logging_steps=1"]
    assert ablations.main([*flags, "--output-dir", str(tmp_path)]) == 0
    assert ablations.main(["--summarize", "--output-dir", str(tmp_path)]) == 0
    found = json.loads(result_path(tmp_path / "rlp" / "digits", 0, "mixing-weight-sigmoid").read_text())
    assert found["settings"]["thoughts"]["sigmoid"] is True
    row = found["result"]["rows"][OWN_THOUGHTS]
    right, log = 100 * row["right"].count("1") / 8, sum(row["log_prob"]) / 8
    entropy = found["result"]["log"][-1]["thought_entropy"]
    text = (tmp_path / "rlp" / "ablations.md").read_text()
    assert f"| mixing weight | sigmoid | {right:.1f} | {log:.3f} | 0.0 | {entropy:.2f} |" in text
    assert text in capsys.readouterr().out
    assert ablations.main(["--summarize", "--output-dir", str(tmp_path / "digits")]) == 1
    assert "holds no results" in capsys.readouterr().err


def test_noise_is_what_thoughts_are_rewarded_with():
    task = TASKS["digits"]
    decoder, tokenizer = jobs.pretrained(task, 0)
    model = wrap(decoder, tokenizer, thought_tokens=3, ahead_tokens=1, rationales=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = torch.tensor([tokenizer(text)["input_ids"] for text in task.answered(4, 0)])
    objective = noise_rewards.NoiseObjective(seed=5, baseline="mean")
    output = model(input_ids=tokens, objective=objective)
    words = len(tokenizer) - 2  # the two tokens of thoughts are never drawn
    assert objective.entropies == [pytest.approx(math.log(words), rel=1e-5)]

    scores = torch.randn(4, tokens.shape[1], 2, generator=torch.Generator().manual_seed(5))
    signed = (scores - scores.mean(-1, keepdim=True))[:, :-1]  # nothing is predicted at the last position
    # All words are as probable: the loss is the mean advantage times log V, and signed advantages have the mean 0.
    assert output.policy_loss.item() == pytest.approx(0.0, abs=1e-6)
    assert output.rewarded.item() == pytest.approx((signed > 0).float().mean().item())
    clamped = model(input_ids=tokens, objective=noise_rewards.NoiseObjective(seed=5, **PAPER))
    expected = signed.clamp(min=0).mean().item() * math.log(words)
    assert clamped.policy_loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_table_of_noise_holds_entropies_before_and_after(tmp_path, monkeypatch, capsys):
    rules = dict(list(noise_rewards.RULES.items())[:2])
    monkeypatch.setattr(noise_rewards, "RULES", rules)
    flags = ["--updates", "2", "--seeds", "0", "1", "--output-dir", str(tmp_path)]
    assert noise_rewards.main(flags) == 0
    found = json.loads((tmp_path / "noise.json").read_text())["entropies"]
    assert list(found) == list(rules)
    [paper, other] = found.values()
    assert [len(curve) for curve in paper] == [2, 2]
    assert [curve[0] for curve in paper] == [curve[0] for curve in other], "all begin with one model"
    assert paper[0][1] != other[0][1]
    change = [100 * (last / first - 1) for first, last in paper]
    low, high = over_seeds(change)
    line = next(each for each in (tmp_path / "noise.md").read_text().splitlines() if "(paper)" in each)
    assert line.endswith(f"| {sum(change) / 2:+.1f} [{low:+.1f}, {high:+.1f}] |")

    monkeypatch.setattr(noise_rewards, "entropies", lambda **_: pytest.fail("done again"))
    assert noise_rewards.main(flags) == 0
    assert noise_rewards.main([*flags, "--updates", "3"]) == 1
    assert "updates is 3, but" in capsys.readouterr().err
