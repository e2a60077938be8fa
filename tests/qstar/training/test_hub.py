"""What a run pushes to the hub, which is a folder here: all that a model needs, and nothing pickled."""

from __future__ import annotations

import io
import pickletools
import zipfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from tiny_runs import tiny_train
from transformers.trainer_utils import HubStrategy

from qstar import load
from qstar.training.checkpoints import MANIFEST_FILE, fault
from qstar.training.hub import OF_A_CHECKPOINT, push_checkpoint

RUN = dict(push_to_hub=True, hub_token="hf_secret", hub_model_id="me/thinker", max_steps=4, logging_steps=1)
SAVING = dict(save_strategy="steps", save_steps=2)
MODEL = ("model.safetensors", "config.json", "qstar_config.json", "qstar/mixing_head.safetensors", "tokenizer.json")


class Hub:
    """A hub in memory.

    Attributes:
        pushes: each message, and the files of the commit by their names.
        files: what the repository holds.
    """

    def __init__(self) -> None:
        self.pushes: list[tuple[str, dict[str, bytes]]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, api, repo_id, **kwargs):
        assert kwargs["token"] == "hf_secret"
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, api, *, folder_path, commit_message, path_in_repo="", ignore_patterns=None, **kwargs):
        assert (kwargs["repo_id"], kwargs["token"]) == ("me/thinker", "hf_secret")
        folder = Path(folder_path)
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        kept = filter_repo_objects(paths, ignore_patterns=ignore_patterns)
        files = {str(Path(path_in_repo) / name): (folder / name).read_bytes() for name in kept}
        self.pushes.append((commit_message, files))
        self.files |= files
        if not kwargs.get("run_as_future"):
            return SimpleNamespace()
        done: Future = Future()
        done.set_result(SimpleNamespace())
        return done


@pytest.fixture
def hub(monkeypatch) -> Hub:
    """The only hub that there is."""
    there = Hub()
    for name in ("create_repo", "upload_folder"):
        method = getattr(there, name)
        monkeypatch.setattr(HfApi, name, lambda api, *args, _method=method, **kwargs: _method(api, *args, **kwargs))
    return there


def is_pickled(content: bytes) -> bool:
    """Whether a file is a pickle, or an archive that holds one, as torch writes it."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(is_pickled(archive.read(name)) for name in archive.namelist())
    if not content.startswith(b"\x80"):
        return False
    try:
        return any(True for _ in pickletools.genops(content))
    except ValueError:
        return False


def test_a_pickle_is_told_from_what_is_none():
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=zipped)
        assert is_pickled(file.getvalue())
    assert not is_pickled(b"{}") and not is_pickled(b"\x89PNG")


@pytest.mark.parametrize("strategy", list(HubStrategy))
def test_nothing_that_is_pushed_is_pickled_and_every_push_is_a_model(strategy, hub, tmp_path):
    """Also those in the midst of a run; none says the token, and what loads is what was trained."""
    result = tiny_train(tmp_path / "run", hub_strategy=strategy.value, curves=True, sample_steps=2, **RUN, **SAVING)
    names = {name for _, files in hub.pushes for name in files}
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)
    for _, files in hub.pushes:
        for name, content in files.items():
            assert not is_pickled(content), name
            assert b"hf_secret" not in content, name
    assert not list((tmp_path / "run").rglob("*.bin"))

    messages = [message for message, _ in hub.pushes]
    steps = [] if strategy == HubStrategy.END else [2, 4]
    whole = strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
    expected = [
        text
        for step in steps
        for text in [f"Training in progress, step {step}", *whole * [f"Training in progress, step {step}, checkpoint"]]
    ]
    assert messages == [*expected, "End of training"]
    last = {"README.md", "metrics.jsonl", "training_args.json", "curves.png", "thoughts/step-000002.parquet", *MODEL}
    assert last <= hub.pushes[-1][1].keys()

    for number, (message, files) in enumerate(hub.pushes):
        if message.endswith("checkpoint"):
            continue
        assert {"README.md", *MODEL} <= files.keys()
        for name, content in files.items():
            path = tmp_path / f"pushed-{number}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        loaded, _ = load(tmp_path / f"pushed-{number}")
        step = int(message.split()[-1]) if message != "End of training" else 4
        kept = load(tmp_path / "run" / f"checkpoint-{step}")[0].state_dict()
        for name, weight in loaded.state_dict().items():
            assert torch.equal(weight, kept[name]), name
            assert step == 2 or torch.equal(weight, result.model.state_dict()[name]), name
    assert 'snapshot_download("me/thinker")' in hub.files["README.md"].decode()


@pytest.mark.parametrize(("strategy", "name"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")])
def test_a_checkpoint_that_was_pushed_is_whole(strategy, name, hub, tmp_path):
    tiny_train(tmp_path / "run", hub_strategy=strategy, **RUN, **SAVING)
    for file, content in hub.files.items():
        if file.startswith(f"{name}/"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
    assert (tmp_path / name / MANIFEST_FILE).is_file() and fault(tmp_path / name) is None


def test_the_state_of_a_run_stays_in_its_checkpoints(hub, tmp_path):
    """A run with its settings beside the model would be taken for one that is finished."""
    tiny_train(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2)
    run = tmp_path / "other"
    place = dict(repo_id="me/thinker", token="hf_secret", revision=None)
    push_checkpoint(tmp_path / "run" / "checkpoint-2", run, HubStrategy.EVERY_SAVE, "now", **place)
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert found == hub.pushes[0][1].keys() and set(MODEL) <= found
    assert not any(name.startswith(pattern.rstrip("*")) for name in found for pattern in OF_A_CHECKPOINT)
