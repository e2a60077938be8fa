"""Nothing is trained that could not be saved, written over, or resumed."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import every_model
import pytest
import tiny
import torch
from tiny_runs import records, texts, tiny_train

from qstar import load, train, wrap
from qstar.training.checkpoints import last_whole_checkpoint
from qstar.training.fit import SETTINGS_FILE
from qstar.training.savable import check_savable
from qstar.training.trainer import QuietStarTrainer


@pytest.fixture
def untrained(monkeypatch):
    """Fails the test if anything is trained."""
    monkeypatch.setattr(QuietStarTrainer, "train", lambda *args, **kwargs: pytest.fail("it has begun to train"))


def test_a_generation_config_that_cannot_be_written_is_refused(tmp_path, untrained):
    model = tiny.plain_model("llama")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.5
    with pytest.raises(ValueError, match=r"model\.generation_config could not be saved"):
        tiny_train(tmp_path / "run", model=model)


def test_weights_that_transformers_does_not_save_are_refused(tmp_path, untrained):
    model = tiny.plain_model("llama")
    model.hf_quantizer = SimpleNamespace(is_serializable=lambda: False)
    with pytest.raises(ValueError, match="loaded by SimpleNamespace, whose weights transformers does not save"):
        tiny_train(tmp_path / "run", model=model)


def test_a_class_that_would_not_be_loaded_again_is_refused(tmp_path):
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    check_savable(model, tmp_path)
    model.config = tiny.plain_model("mistral").config
    with pytest.raises(
        ValueError, match="a LlamaForCausalLM, but AutoModelForCausalLM would load its folder as Mistral"
    ):
        check_savable(model, tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, untrained):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"output_dir is .*file/run', but it cannot be written to"):
        tiny_train(tmp_path / "file" / "run")


def test_a_disk_without_room_for_the_model_is_refused(tmp_path, monkeypatch, untrained):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"its disk has 0\.00 GiB, and the model takes"):
        tiny_train(tmp_path / "run")


def test_a_run_does_not_write_over_the_model_that_it_begins_with(tmp_path, untrained):
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="but the model is there: training would write over it"):
        train(str(tmp_path / "model"), texts(), output_dir=tmp_path / "model" / ".." / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


OPTIONS = dict(max_steps=4, save_strategy="steps", save_steps=2, seed=3)


@pytest.fixture
def cut_run(tmp_path, monkeypatch):
    """Makes a run in ``runs/quiet-star...`` that was cut short after its first checkpoint."""
    monkeypatch.chdir(tmp_path)

    def make() -> str:
        folder = tiny_train(None, **OPTIONS).folder
        (folder / SETTINGS_FILE).unlink()
        shutil.rmtree(folder / "checkpoint-4")
        return str(folder)

    return make


def test_resuming_without_a_folder_takes_the_run_that_was_cut_short(cut_run, monkeypatch):
    """Not the finished one that has the default's name."""
    finished = tiny_train(None, **OPTIONS).folder
    weights = (finished / "model.safetensors").read_bytes()
    cut = cut_run()
    assert (str(finished), cut) == ("runs/quiet-star", "runs/quiet-star-2")
    resumed = tiny_train(None, resume_from_checkpoint=True, **OPTIONS)
    assert str(resumed.folder) == cut
    assert [record["step"] for record in records(resumed.folder) if "train_runtime" in record] == [4, 4]
    assert (finished / "model.safetensors").read_bytes() == weights


def test_resuming_without_a_folder_asks_which_of_several_and_says_where_there_is_none(cut_run):
    with pytest.raises(FileNotFoundError, match="no run in runs was cut short: name one by output_dir"):
        tiny_train(None, resume_from_checkpoint=True, **OPTIONS)
    names = cut_run(), cut_run()
    with pytest.raises(ValueError, match=f"{names[0]}, {names[1]} were all cut short: name one by output_dir"):
        tiny_train(None, resume_from_checkpoint=True, **OPTIONS)


def test_a_checkpoint_says_which_run_it_belongs_to(cut_run):
    names = cut_run(), cut_run()
    resumed = tiny_train(None, resume_from_checkpoint=f"{names[1]}/checkpoint-2", **OPTIONS)
    assert str(resumed.folder) == names[1]


def test_a_finished_run_is_not_trained_on(tmp_path, monkeypatch):
    """Resuming it gives what it ended with; with more steps it goes on."""
    whole = tiny_train(tmp_path, **OPTIONS).model.state_dict()
    steps, compute = [], QuietStarTrainer.compute_loss

    def watched(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "compute_loss", watched)
    again = tiny_train(tmp_path, resume_from_checkpoint=True, **OPTIONS)
    assert steps == []
    for name, tensor in load(tmp_path)[0].state_dict().items():
        assert torch.equal(tensor, whole[name]), name
        assert torch.equal(again.model.state_dict()[name], whole[name]), name
    tiny_train(tmp_path, resume_from_checkpoint=True, **(OPTIONS | dict(max_steps=5)))
    assert steps == [4]


def test_a_run_of_whole_epochs_that_is_finished_is_not_trained_on(tmp_path, monkeypatch):
    options = OPTIONS | dict(max_steps=-1, num_train_epochs=1)
    tiny_train(tmp_path, texts(8), **options)
    assert last_whole_checkpoint(tmp_path) is not None
    monkeypatch.setattr(QuietStarTrainer, "compute_loss", lambda *args, **kwargs: pytest.fail("it trains on"))
    tiny_train(tmp_path, texts(8), resume_from_checkpoint=True, **options)


def test_resuming_warns_of_nothing_that_is_missing(tmp_path, caplog):
    tiny_train(tmp_path, **(OPTIONS | dict(max_steps=2)))
    tiny_train(tmp_path, resume_from_checkpoint=True, **OPTIONS)
    assert "missing keys" not in caplog.text


def test_a_class_of_transformers_that_does_not_load_its_own_folder_is_refused(tmp_path):
    """Emu3's text part is no class that a folder's configuration leads to."""
    model = wrap(every_model.tiny_model("emu3"), tiny.tokenizer(), thought_tokens=2, ahead_tokens=1)
    with pytest.raises(ValueError, match="the model is a Emu3ForCausalLM, but AutoModelForCausalLM would load"):
        check_savable(model, tmp_path)
