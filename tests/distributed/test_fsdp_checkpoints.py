"""What FSDP2 runs of two processes save is whole: they go on from it bit for bit, and so does a run of one process."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from on_processes import RANKS, free_port, leave, meet, on_every_rank
from sharded_runs import ROWS, a_trainer
from tiny_runs import records

from qstar import load
from qstar.training.checkpoints import fault
from qstar.training.sharding import whole

STEPS = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3)
SHUFFLED = dict(
    train_sampling_strategy="random", per_device_train_batch_size=1, gradient_accumulation_steps=2, max_grid_tokens=50
) | dict(seq_length=12)
GREEDY = dict(max_new_tokens=5, do_sample=False)


def sha256(folder: Path) -> dict[str, str]:
    """Of every file of weights in a folder and below."""
    files = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def save_whole_then_cut(rank: int, port: int, folder: Path, family: str, settings: dict) -> None:
    """A run, the same run from the middle on, and what each of their models says."""
    meet(rank, port)
    for name in ("whole", "cut"):
        trainer = a_trainer(folder / name, family, "fsdp", **STEPS | settings)
        trainer.train(resume_from_checkpoint=name == "cut")
        trainer.save_model()
        said = trainer.model.generate(tiny.text(2, 6), **GREEDY)
        weights = whole(trainer.model.state_dict(), keep=True)
        torch.save({"said": said, "weights": weights}, folder / f"{name}-{rank}.pt")
        if name == "whole" and rank == 0:
            shutil.copytree(folder / "whole" / "checkpoint-2", folder / "cut" / "checkpoint-2")
        torch.distributed.barrier()
    leave()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("gpt2", {}, id="gpt2"),
        pytest.param("llama", dict(streamed=True), id="stream"),
        pytest.param("llama", SHUFFLED, id="shuffled-and-accumulated"),
    ],
)
def test_a_sharded_run_goes_on_bit_for_bit(family, settings, tmp_path):
    """And what it leaves is an ordinary folder, whose model says what the sharded one said."""
    on_every_rank(save_whole_then_cut, free_port(), tmp_path, family, settings)
    for step in (2, 4):
        assert fault(tmp_path / "whole" / f"checkpoint-{step}") is None
    assert sha256(tmp_path / "cut" / "checkpoint-4") == sha256(tmp_path / "whole" / "checkpoint-4")
    model, _ = load(tmp_path / "whole")
    assert type(model).__name__ == model.config.architectures[0] == type(tiny.plain_model(family)).__name__
    said = model.generate(tiny.text(2, 6), **GREEDY)
    spare = [model.qstar.start_token_id, model.qstar.end_token_id]  # rows that are for saving only
    for rank in range(RANKS):
        left = [torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("whole", "cut")]
        assert all(torch.equal(each["said"], said) for each in left)
        for name, weight in model.state_dict().items():
            if weight.shape == model.get_input_embeddings().weight.shape:
                weight[spare] = left[0]["weights"][name][spare] = left[1]["weights"][name][spare] = 0
            assert torch.equal(left[0]["weights"][name], left[1]["weights"][name]), name
            assert torch.equal(left[0]["weights"][name], weight), name

    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "alone" / "checkpoint-2")
    one_batch = settings | dict(per_device_train_batch_size=ROWS, gradient_accumulation_steps=1)
    alone = a_trainer(tmp_path / "alone", family, **STEPS | one_batch)
    alone.train(resume_from_checkpoint=True)
    for two, one in zip(records(tmp_path / "cut")[:2], records(tmp_path / "alone")[:2], strict=True):
        assert two["step"] == one["step"] and two["loss"] == pytest.approx(one["loss"], rel=1e-5)
