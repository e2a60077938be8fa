"""How much thoughts help at a weight that does not learn: it is held, and the tables say what was scored."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

import constant_weights
from constant_weights import gains, hold_weight, scores_by_weight
from real.settings import RealModelSettings
from real.sources import Sources

FLAGS = ["--seq-length", "12", "--thought-tokens", "2", "--held-out", "3", "--held-out-rows", "3"]


@pytest.fixture
def sources(tmp_path):
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    texts = [" ".join(["a", "b", "c", *"defghij"][number % 6 :] + ["a"] * number) for number in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    settings = RealModelSettings(seq_length=12, thought_tokens=2, held_out=3, held_out_rows=3)
    return Sources(str(tmp_path / "model"), str(tmp_path / "texts.jsonl"), "gsm8k", settings)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_weight_is_held_whatever_is_read(weight):
    model = tiny.thinking_model("llama")
    hold_weight(model.qstar_mixing_head, weight)
    base, thought = torch.randn(4, model.config.hidden_size), torch.randn(4, model.config.hidden_size)
    mixed, weights = model.qstar_mixing_head(base, thought, torch.arange(4))
    torch.testing.assert_close(weights, torch.full((4,), weight), rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed, base + weight * (thought - base), rtol=1e-5, atol=1e-6)


def test_a_gain_is_the_mean_difference_and_none_where_the_weight_is_0(sources):
    before, found = scores_by_weight(sources, [0.0, 0.5])
    names, differences = gains(before, found)
    assert names[0] == "all" and len(names) == 5
    for reads in ("its thoughts", "random tokens"):
        assert differences[reads, 0.0].means[0] == 0
        half = differences[reads, 0.5]
        expected = (found[reads, 0.5].after.double() - before.without.double()).mean().item()
        assert half.means[0] == pytest.approx(expected, abs=1e-9) and abs(expected) > 1e-4
        assert half.intervals[0].low <= half.means[0] <= half.intervals[0].high
    assert differences["its thoughts", 0.5].means != differences["random tokens", 0.5].means


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_is_left_of_the_head_that_was_there(sources, bf16):
    """Also by autocast, which keeps rounded weights."""
    sources.settings.eval_bf16 = bf16
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # of the head's first layers
        _, found = scores_by_weight(sources, [1.0])
        results.append([found[reads, 1.0].after for reads in ("its thoughts", "random tokens")])
    for x, same in zip(*results, strict=True):
        assert torch.equal(x, same)


def test_the_command_writes_what_it_prints(sources, tmp_path, capsys):
    folder = tmp_path / "out"
    flags = ["--model", sources.model, "--dataset", sources.dataset, "--output-dir", str(folder), *FLAGS]
    assert constant_weights.main([*flags, "--weights", "0.5", "1"]) == 0
    record, table = json.loads((folder / "weights.json").read_text()), (folder / "weights.md").read_text()
    assert capsys.readouterr().out.strip() == table.strip()
    assert record["settings"]["thought_tokens"] == 2 and record["tokens"] > 0
    found = {(each["reads"], each["weight"]): each["mean"][0] for each in record["gains"]}
    assert list(found) == [(reads, weight) for weight in (0.5, 1.0) for reads in ("its thoughts", "random tokens")]
    for (reads, weight), mean in found.items():
        assert f"| {weight:g} | {reads} | {mean:+.3f} [" in table


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--weights", "nan"], "a weight is 'nan', but it must be a finite number"),
        (["--held-out", "1"], "held_out is 1, but it must be at least 2"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_refused_with_its_name(sources, tmp_path, capsys, flags, said):
    usual = ["--model", sources.model, "--dataset", sources.dataset, "--output-dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        constant_weights.main([*usual, *flags])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_settings_of_training_are_refused(capsys):
    with pytest.raises(SystemExit):
        constant_weights.main(["--model", "m", "--dataset", "d", "--output-dir", "o", "--learning-rate", "1"])
    assert "--learning-rate" in capsys.readouterr().err
