"""``qstar train --lora`` and ``qstar merge``."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_folder import base_folder
from tiny_runs import texts, tiny_train
from transformers import AutoModelForCausalLM

from qstar import load
from qstar.commands.main import main
from qstar.commands.train import config_of

TINY = ("--max-steps", "2", "--seq-length", "12", "--batch-size", "2", "--thought-tokens", "2", "--ahead-tokens", "2")
QUIET = ("--save-strategy", "no", "--report-to", "none", "--disable-tqdm", "true", "--sample-steps", "0")
LORA = ("--lora", "--lora-rank", "3", "--lora-alpha", "6", "--lora-targets", "q_proj", "up_proj")


@pytest.fixture
def given(tmp_path) -> tuple[str, ...]:
    base_folder(tmp_path / "base")
    texts(8).to_json(tmp_path / "texts.jsonl")
    return ("--model", str(tmp_path / "base"), "--dataset", str(tmp_path / "texts.jsonl"), *TINY, *QUIET)


def test_flags_train_adapters_and_a_command_merges_them(tmp_path, given, capsys):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["train", *given, *LORA, "--learning-rate", "1e-3", "--output-dir", str(run)]) == 0
    model, _ = load(run)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert set(layers) == {f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")}
    assert [module.scaling for module in layers.values()] == [{"default": 2.0}] * 4
    assert main(["merge", str(run), str(merged)]) == 0
    assert f"saved in {merged}" in capsys.readouterr().out
    tokens = tiny.text(2, 9)
    wanted = model.eval()(input_ids=tokens).logits
    for found in (load(merged)[0], AutoModelForCausalLM.from_pretrained(merged)):
        assert torch.allclose(found.eval()(input_ids=tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    head = load(merged)[0].qstar_mixing_head.output.weight
    assert torch.equal(head, model.qstar_mixing_head.output.weight)


def test_merging_is_refused_where_there_is_nothing_to_merge_or_something_in_the_way(tmp_path, given, capsys):
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "merged")]) == 1
    assert "base', but it must hold adapters, as `qstar train --lora` writes them" in capsys.readouterr().err
    tiny_train(tmp_path / "run", model=str(tmp_path / "base"), lora=True, max_steps=1)
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "base")]) == 1
    assert "base', but it is not empty: choose another folder" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.vocab_size == len(tiny.WORDS)


def test_a_file_of_settings_has_those_of_adapters(tmp_path, given, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("lora: yes\nlora_rank: 5\nlora_targets: [v_proj]\n")
    assert main(["train", *given, "--config", str(path), "--lora-rank", "4", "--print-config"]) == 0
    assert {"lora: true", "lora_rank: 4", 'lora_targets: ["v_proj"]'} <= set(capsys.readouterr().out.splitlines())
    assert "lora" not in config_of({"lora": False, "model": "a/b", "lora_alpha": 32.0}, full=False)


def test_a_dry_run_counts_what_learns_and_what_is_kept(tmp_path, given, capsys):
    """A rank of 3 over inputs and outputs of two layers; the mixing head, 2E E + E + E E + E + E; two embeddings."""
    arguments = ["train", *given, *LORA, "--output-dir", str(tmp_path / "run")]
    assert main([*arguments, "--dry-run"]) == 0
    adapters = 2 * 3 * ((32 + 32) + (32 + 48))
    thoughts = 2 * 32 * 32 + 32 + 32 * 32 + 32 + 32 + 2 * 32
    said = capsys.readouterr().out
    assert f"{adapters + thoughts:,} of which learn" in said
    assert f"the model {4 * (adapters + thoughts) / 2**20:.2f} MiB" in said


def test_the_embedded_default_has_no_adapters(tmp_path, capsys):
    assert main(["train", "--lora", "--output-dir", str(tmp_path / "run")]) == 1
    assert "lora is True, but the embedded default has its own: qstar.train() takes it" in capsys.readouterr().err
