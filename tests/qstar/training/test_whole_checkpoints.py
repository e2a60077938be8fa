"""Whatever happens to a file of the newest checkpoint is noticed, and the run goes on from the one before it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import texts, tiny_train

from qstar.training.checkpoints import MANIFEST_FILE, fault, last_whole_checkpoint, rotate
from qstar.training.trainer import QuietStarTrainer

OPTIONS = dict(max_steps=4, save_strategy="steps", save_steps=1)
FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "qstar/mixing_head.safetensors"),
    *("qstar_config.json", "tokenizer.json", "tokenizer_config.json", "training_args.json", "trainer_state.json"),
    *("optimizer.json", "optimizer.safetensors", "scheduler.json"),
    *("random_state_0.json", "random_state_0.safetensors", MANIFEST_FILE),
)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_in_the_middle(path: Path) -> None:
    flip(path, path.stat().st_size * 4 + 3)


CORRUPTIONS: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": Path.unlink,
    "flipped bit": flip_in_the_middle,
    "made longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
}


def weights(run: Path) -> list[str]:
    """SHA-256 of what a run has learned."""
    files = ("model.safetensors", "qstar/mixing_head.safetensors")
    return [hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_train(folder, **OPTIONS)
    return folder


@pytest.fixture
def cut(whole, tmp_path) -> Path:
    """The same run, killed in its last step."""
    for step in (2, 3):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "cut" / f"checkpoint-{step}")
    return tmp_path / "cut"


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The steps that are computed, in order."""
    taken, compute = [], QuietStarTrainer.compute_loss

    def watched(trainer, *args, **kwargs):
        taken.append(trainer.state.global_step)
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "compute_loss", watched)
    return taken


def test_a_checkpoint_holds_these_files_and_a_manifest_of_each(whole):
    checkpoint = whole / "checkpoint-3"
    found = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    assert found == set(FILES)
    listed = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert {entry["name"] for entry in listed} == found - {MANIFEST_FILE}
    for entry in listed:
        content = (checkpoint / entry["name"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest()), entry["name"]
    assert fault(checkpoint) is None
    assert not list(whole.glob("partial-*"))


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_as_it_was_written_is_named(name, corruption, cut, caplog):
    CORRUPTIONS[corruption](cut / "checkpoint-3" / name)
    assert last_whole_checkpoint(cut) == cut / "checkpoint-2"
    assert len(caplog.records) == 1
    assert f"checkpoint-3 is left out: {name} " in caplog.text


@pytest.mark.parametrize("name", ["added.json", "qstar/added.safetensors", "model.safetensors.index.json"])
def test_a_file_that_was_added_is_named(name, cut, caplog):
    (cut / "checkpoint-3" / name).write_bytes(b"")
    assert last_whole_checkpoint(cut) == cut / "checkpoint-2"
    assert f"checkpoint-3 is left out: {name} is not in its manifest.json" in caplog.text


@pytest.mark.parametrize("name", [MANIFEST_FILE, "scheduler.json", "trainer_state.json"])
def test_no_bit_of_a_file_can_flip_unnoticed(name, cut):
    path = cut / "checkpoint-3" / name
    written = path.read_bytes()
    for bit in range(0, len(written) * 8, 29):
        flip(path, bit)
        found = fault(cut / "checkpoint-3")
        assert found is not None and found.startswith(name), bit
        path.write_bytes(written)
    assert fault(cut / "checkpoint-3") is None


CASES = [(name, corruption) for name in FILES for corruption in CORRUPTIONS]
QUICK = [("model.safetensors", "flipped bit"), ("optimizer.safetensors", "deleted"), ("scheduler.json", "truncated")]


@pytest.mark.parametrize(
    ("name", "corruption"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_run_goes_on_before_a_corruption_and_ends_with_the_same_weights(name, corruption, whole, cut, steps):
    CORRUPTIONS[corruption](cut / "checkpoint-3" / name)
    tiny_train(cut, resume_from_checkpoint=True, **OPTIONS)
    assert steps == [2, 3]
    assert weights(cut) == weights(whole)
    assert last_whole_checkpoint(cut) == cut / "checkpoint-4"
    assert fault(cut / "checkpoint-3") is None  # it was written again


def test_a_run_goes_on_before_an_added_file_and_ends_with_the_same_weights(whole, cut, steps):
    (cut / "checkpoint-3" / "added").touch()
    tiny_train(cut, resume_from_checkpoint=True, **OPTIONS)
    assert steps == [2, 3]
    assert weights(cut) == weights(whole)


def test_a_run_without_a_whole_checkpoint_begins_at_the_beginning_and_says_so(whole, cut, steps, caplog):
    for step in (2, 3):
        flip_in_the_middle(cut / f"checkpoint-{step}" / "model.safetensors")
    tiny_train(cut, resume_from_checkpoint=True, **OPTIONS)
    assert steps == [0, 1, 2, 3]
    assert "holds no whole checkpoint: training begins at the beginning" in caplog.text
    assert weights(cut) == weights(whole)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_checkpoint_that_is_given_must_be_whole(corruption, cut, steps):
    CORRUPTIONS[corruption](cut / "checkpoint-3" / "optimizer.safetensors")
    reason = {"deleted": "is missing", "flipped bit": "is not what was written"}.get(corruption, r"has \d+ bytes, but ")
    with pytest.raises(ValueError, match=rf"checkpoint-3', but optimizer\.safetensors {reason}"):
        tiny_train(cut, resume_from_checkpoint=cut / "checkpoint-3", **OPTIONS)
    with pytest.raises(ValueError, match="checkpoint-9', but there is no such folder"):
        tiny_train(cut, resume_from_checkpoint=cut / "checkpoint-9", **OPTIONS)
    assert steps == []


def test_the_best_model_must_be_whole_when_the_run_ends(tmp_path, monkeypatch):
    load_best = QuietStarTrainer._load_best_model

    def spoiled(trainer):
        flip_in_the_middle(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
        load_best(trainer)

    monkeypatch.setattr(QuietStarTrainer, "_load_best_model", spoiled)
    options = OPTIONS | dict(max_steps=2, eval_strategy="steps", eval_steps=1, eval_dataset=texts(4))
    options |= dict(load_best_model_at_end=True, metric_for_best_model="eval_nll_talk")
    with pytest.raises(ValueError, match=r"best model of the run is that of .*checkpoint-., but model\.safetensors is"):
        tiny_train(tmp_path, **options)


def test_only_as_many_checkpoints_are_kept_as_are_asked_for(tmp_path):
    tiny_train(tmp_path, save_total_limit=2, **OPTIONS)
    kept = sorted(path.name for path in tmp_path.glob("*checkpoint*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    assert all(fault(tmp_path / name) is None for name in kept)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_checkpoint_that_is_left_out_does_not_outlive_a_new_one(limit, cut):
    """Though its step is a later one: the limit would otherwise remove what was just written."""
    (cut / "checkpoint-3").rename(cut / "checkpoint-9")
    flip_in_the_middle(cut / "checkpoint-9" / "model.safetensors")
    tiny_train(cut, resume_from_checkpoint=True, save_total_limit=limit, **OPTIONS)
    kept = sorted(path.name for path in cut.glob("*checkpoint*"))
    assert kept == ["checkpoint-3", "checkpoint-4"][-limit:]
    assert all(fault(cut / name) is None for name in kept)


def test_the_best_checkpoint_stays_where_others_go(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    latest, best = tmp_path / "checkpoint-4", tmp_path / "checkpoint-1"
    rotate(latest, str(best), None)
    assert len(list(tmp_path.iterdir())) == 4
    rotate(latest, str(best), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    rotate(latest, str(best), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4"]


def test_what_a_kill_has_left_is_removed_by_the_next_checkpoint(cut):
    (cut / "partial-checkpoint-4").mkdir()
    (cut / "partial-checkpoint-4" / "config.json").write_text("{")
    assert last_whole_checkpoint(cut) == cut / "checkpoint-3"
    tiny_train(cut, resume_from_checkpoint=True, **OPTIONS)
    assert not list(cut.glob("partial-*"))
    assert fault(cut / "checkpoint-4") is None


def test_a_checkpoint_without_the_optimizer_is_not_trained_on(tmp_path, steps):
    tiny_train(tmp_path, save_only_model=True, **(OPTIONS | dict(max_steps=2)))
    assert fault(tmp_path / "checkpoint-2") is None
    with pytest.raises(ValueError, match=r"holds no optimizer\.json to go on with: .* save_only_model"):
        tiny_train(tmp_path, resume_from_checkpoint=True, **OPTIONS)
