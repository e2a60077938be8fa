"""No file of a checkpoint or a model is unpickled in a way that could run what it holds."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_runs import QUIET, tiny_train
from transformers import Trainer

from qstar import load, wrap
from qstar.training.checkpoints import MANIFEST_FILE, begin, finish, partial
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

OPTIONS = dict(max_steps=3, save_strategy="steps", save_steps=1)
READ_BY_TRANSFORMERS = (
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin", "adapter_model.bin"),
    *("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"),
    *("training_args.bin", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata"),
)
WRITTEN = (
    *("config.json", "generation_config.json", "model.safetensors", "qstar/mixing_head.safetensors"),
    *("qstar_config.json", "tokenizer.json", "tokenizer_config.json", "training_args.json", "trainer_state.json"),
    *("optimizer.json", "optimizer.safetensors", "scheduler.json"),
    *("random_state_0.json", "random_state_0.safetensors"),
)
UNUSED = (  # by a run that goes on: it has the model, the tokenizer and the settings that it was called with
    *("generation_config.json", "qstar_config.json", "tokenizer.json", "tokenizer_config.json", "training_args.json"),
)


class Bomb:
    """A pickle that makes a folder where it is unpickled."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_train(folder, **OPTIONS)
    return folder


@pytest.fixture(
    params=[
        "torch.save",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pickle", "torch.save, old format")),
    ]
)
def bomb(request, tmp_path) -> bytes:
    """A file that makes the folder ``tmp_path / "exploded"`` where it is unpickled."""
    file, content = tmp_path / "bomb", Bomb(tmp_path / "exploded")
    if request.param == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=request.param == "torch.save")
    return file.read_bytes()


def put(checkpoint: Path, name: str, content: bytes) -> None:
    """Write a file into a checkpoint, with a manifest that fits."""
    moved = checkpoint.rename(checkpoint.with_name("moved"))
    (moved / name).parent.mkdir(exist_ok=True)
    (moved / name).write_bytes(content)
    (moved / MANIFEST_FILE).unlink()
    begin(checkpoint)
    shutil.copytree(moved, partial(checkpoint), dirs_exist_ok=True)
    finish(checkpoint)


def test_a_bomb_explodes_where_it_is_unpickled(bomb, tmp_path):
    if bomb[:2] == b"\x80\x04":
        pickle.loads(bomb)
    else:
        torch.load(tmp_path / "bomb", weights_only=False)
    assert (tmp_path / "exploded").is_dir()


@pytest.mark.parametrize("name", [*READ_BY_TRANSFORMERS, *WRITTEN])
def test_a_bomb_in_a_checkpoint_does_not_explode_though_its_manifest_lists_it(name, bomb, whole, tmp_path):
    """Files that transformers would unpickle are refused; what training goes on with cannot be read."""
    run = tmp_path / "run"
    shutil.copytree(whole / "checkpoint-2", run / "checkpoint-2")
    put(run / "checkpoint-2", name, bomb)
    if name in UNUSED:
        tiny_train(run, resume_from_checkpoint=run / "checkpoint-2", **OPTIONS)
    else:
        reason = "would have to be unpickled" if name in READ_BY_TRANSFORMERS else "."
        with pytest.raises(Exception, match=reason):
            tiny_train(run, resume_from_checkpoint=run / "checkpoint-2", **OPTIONS)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_transformers_is_refused_with_the_reason(whole, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    shutil.copytree(whole / "checkpoint-2", checkpoint)
    (checkpoint / MANIFEST_FILE).unlink()
    torch.save({"state": {}}, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"but optimizer\.pt would have to be unpickled, which could run any code"):
        tiny_train(tmp_path / "run", resume_from_checkpoint=checkpoint, **OPTIONS)


def test_nothing_that_is_written_is_a_pickle(whole):
    for path in whole.rglob("*"):
        if path.is_file():
            assert path.suffix in (".json", ".jsonl", ".safetensors") or path == whole / "README.md", path


@pytest.mark.parametrize("thinking", [False, True])
def test_a_bomb_in_the_weights_of_a_model_does_not_explode(thinking, bomb, tmp_path):
    """Pickled weights are read as tensors and nothing else."""
    folder, tokenizer = tmp_path / "model", tiny.tokenizer()
    model = tiny.plain_model("llama")
    if thinking:
        model = wrap(model, tokenizer, thought_tokens=2, ahead_tokens=2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert tiny_train(tmp_path / "control", model=folder, max_steps=1).metrics["step"] == 1
    shutil.copy(tmp_path / "bomb", folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model is '.*', but its weights are a pickle that holds more than tensors"):
        tiny_train(tmp_path / "run", model=folder)
    if thinking:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load(folder)
    assert not (tmp_path / "exploded").exists()


def test_training_with_deepspeed_writes_no_checkpoints(tmp_path, monkeypatch):
    """Its own are pickles."""
    begin = Trainer.__init__

    def sharded(trainer, *args, **kwargs):
        begin(trainer, *args, **kwargs)
        trainer.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "__init__", sharded)
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    for strategy in ("steps", "epoch"):
        args = QuietStarArguments(str(tmp_path), **(QUIET | dict(save_strategy=strategy)))
        with pytest.raises(ValueError, match=f"save_strategy is '{strategy}', but with DeepSpeed it must be 'no'"):
            QuietStarTrainer(model, args)
    assert QuietStarTrainer(model, QuietStarArguments(str(tmp_path), **QUIET)).is_deepspeed_enabled
