"""Optimizers whose states take 8 bits."""

import hashlib
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file

from qstar import train

SETTINGS = dict(
    max_steps=4, save_steps=2, per_device_train_batch_size=2, seq_length=8, learning_rate=1e-3, use_cpu=True
) | dict(report_to="none", disable_tqdm=True, sample_steps=0, thought_tokens=2, ahead_tokens=2, rationales=2)


def run(folder: Path, **settings) -> str:
    """Train a small model; the SHA-256 of its weights."""
    model = tiny.plain_model("llama", hidden_size=64, intermediate_size=128)
    rows = Dataset.from_dict({"text": ["w1 w2 w3 w4 w5 w6 w7 w8 w9 w3 w4 w5"] * 12})
    train(model=model, tokenizer=tiny.tokenizer(), dataset=rows, output_dir=folder, **SETTINGS, **settings)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "lion_8bit"])
def test_states_of_8_bits_are_saved_and_go_on_bit_for_bit(tmp_path, optim):
    pytest.importorskip("bitsandbytes")
    whole = run(tmp_path / "run", optim=optim)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").unlink()
    states = load_file(tmp_path / "run" / "checkpoint-2" / "optimizer.safetensors")
    assert any(x.dtype == torch.uint8 and x.numel() == 64 * 128 for x in states.values())
    assert run(tmp_path / "run", optim=optim, resume_from_checkpoint=True) == whole


@pytest.mark.parametrize("optim", ["adamw_torch_4bit", "adamw_torch_8bit"])
def test_states_that_no_checkpoint_holds_are_refused_before_training(tmp_path, optim):
    with pytest.raises(
        ValueError, match=f"optim is '{optim}', whose states no checkpoint can hold: adamw_bnb_8bit has"
    ):
        run(tmp_path / "run", optim=optim)
    assert not (tmp_path / "run").exists()
