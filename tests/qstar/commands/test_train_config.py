"""``qstar train --config``: file and flags make the run that flags alone would; what is printed makes it again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from qstar import load
from qstar.commands import train as command
from qstar.commands.main import main
from qstar.training.stages import Stage, read_stages

ROOT = Path(__file__).resolve().parents[3]
LINES = ["a b c d e f g h", "c a b e d f", "b b a c d e f g h i", "a c e g i k"]
CONFIG = """
model: {root}/model
dataset: {root}/train.jsonl
output_dir: {root}/from-file
thought_tokens: 2
ahead_tokens: 1
sigmoid: yes
batch_size: 4
seq_length: 8
max_steps: 2
learning_rate: 1e-2
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {{min_lr: 1e-3}}
save_strategy: no
use_cpu: on
disable_tqdm: true
sample_steps: 0
seed: 5
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a plain model and its tokenizer, a file of text, and one of settings."""
    root = tmp_path_factory.mktemp("config")
    tiny.plain_model("llama").save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    Dataset.from_dict({"text": LINES}).to_json(root / "train.jsonl")
    (root / "run.yaml").write_text(CONFIG.format(root=root))
    return root


@pytest.fixture
def called(monkeypatch) -> dict[str, Any]:
    """What the functions that train are called with, in their place."""
    seen: dict[str, Any] = {}

    class Done:
        folder = "nowhere"

    for name in ("train", "train_embedded"):
        monkeypatch.setattr(command, name, lambda name=name, **given: (seen.update({name: given}), Done)[1])
    return seen


def weights(folder) -> dict[str, torch.Tensor]:
    return load(folder)[0].state_dict()


def test_a_file_makes_the_run_that_flags_would(root, tmp_path):
    assert main(["train", "--config", str(root / "run.yaml"), "--seed", "6"]) == 0
    flags = (
        f"--model {root}/model --dataset {root}/train.jsonl --output-dir {tmp_path}/run --thought-tokens 2 --sigmoid"
    )
    more = "--ahead-tokens 1 --batch-size 4 --seq-length 8 --max-steps 2 --learning-rate 1e-2 --save-strategy no"
    last = "--lr-scheduler-type cosine_with_min_lr --use-cpu --disable-tqdm true --sample-steps 0 --seed 6"
    arguments = f"train {flags} {more} {last}".split()
    assert main([*arguments, "--lr-scheduler-kwargs", '{"min_lr": 1e-3}']) == 0
    ours, theirs = weights(root / "from-file"), weights(tmp_path / "run")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    before = tiny.plain_model("llama").lm_head.weight
    assert not torch.equal(ours["lm_head.weight"][: len(before)], before)
    settings = [json.loads((f / "training_args.json").read_text()) for f in (root / "from-file", tmp_path / "run")]
    assert [each.pop("output_dir") for each in settings] == [str(root / "from-file"), str(tmp_path / "run")]
    assert settings[0] == settings[1] and settings[0]["seed"] == 6


def test_flags_win_over_the_file_by_whichever_name(root, called):
    flags = ["--per-device-train-batch-size", "2", "--learning-rate", "0.5", "--use-cpu", "false"]
    assert main(["train", "--config", str(root / "run.yaml"), *flags]) == 0
    [given] = called.values()
    assert given["per_device_train_batch_size"] == 2 and "batch_size" not in given
    assert (given["learning_rate"], given["use_cpu"], given["thought_tokens"]) == (0.5, False, 2)


def test_a_file_without_a_model_is_for_the_embedded_default(tmp_path, called):
    (tmp_path / "run.yaml").write_text("max_steps: 3\nmodel: null\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--seed", "1"]) == 0
    assert called == {"train_embedded": {"max_steps": 3, "seed": 1}}


def test_a_file_can_resume_and_a_flag_can_name_the_checkpoint(tmp_path, called):
    (tmp_path / "run.yaml").write_text("model: a\ndataset: b\nresume: yes\n")
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert called["train"] == {"model": "a", "dataset": "b", "resume_from_checkpoint": True}
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--resume", "false"]) == 0
    assert called["train"] == {"model": "a", "dataset": "b"}
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--resume-from-checkpoint", "c"]) == 0
    assert called["train"] == {"model": "a", "dataset": "b", "resume_from_checkpoint": "c"}


def test_a_truth_value_is_not_taken_for_the_folder_of_a_checkpoint(tmp_path, capsys, called, monkeypatch):
    (tmp_path / "run.yaml").write_text("model: a\ndataset: b\nresume_from_checkpoint: true\n")
    arguments = ["train", "--config", str(tmp_path / "run.yaml")]
    assert main(arguments) == 1
    error = (
        "resume_from_checkpoint is 'true', but it must be the folder of a checkpoint; resume goes on with the last one"
    )
    assert capsys.readouterr().err == f"qstar train: {error}\n"
    assert called == {}
    (tmp_path / "true").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    assert called["train"]["resume_from_checkpoint"] == "true"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: x", ", line 1: seed is 'x', but it must be an integer"),
        ("sed: 1", " has no setting 'sed'; did you mean 'seed'?"),
        ("config: a.yaml", " has no setting 'config'"),
    ],
)
def test_a_file_with_a_mistake_is_refused_before_anything_is_read(tmp_path, capsys, called, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 1
    assert capsys.readouterr().err.startswith(f"qstar train: {tmp_path / 'run.yaml'}{message}")
    assert called == {}


def test_two_names_of_one_setting_in_a_file_are_refused(root, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("batch_size: 1\nper_device_train_batch_size: 1\n")
    arguments = ["train", "--config", str(tmp_path / "run.yaml"), "--print-config"]
    assert main(arguments) == 1
    assert "batch_size is another name for per_device_train_batch_size, but both are given" in capsys.readouterr().err
    assert main([*arguments[:-1], "--batch-size", "2", arguments[-1]]) == 0
    assert capsys.readouterr().out == "batch_size: 2\n"


@pytest.mark.parametrize("more", [[], ["full"]], ids=["changed", "full"])
def test_what_is_printed_makes_the_same_run(root, tmp_path, capsys, called, more):
    flags = ["--run-name", "no # 1", "--warmup-steps", "0.25", "--logging-steps", "10", "--eval-split", "test"]
    arguments = ["train", "--config", str(root / "run.yaml"), *flags]
    assert main([*arguments, "--print-config", *more]) == 0
    assert called == {}, "nothing is trained"
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    assert main(arguments) == 0
    expected = called.pop("train")
    assert {expected.pop("logging_steps"), expected.pop("eval_split")} == {10.0, "test"}, "which are the defaults"
    assert main(["train", "--config", str(tmp_path / "printed.yaml")]) == 0
    assert called["train"] == expected
    active = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(active) == len(expected)
    assert ("# N: text tokens in a row." in text) == bool(more)


def test_printing_writes_nothing(root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--print-config"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["train", "--print-config", "full"]) == 0
    text = capsys.readouterr().out
    assert "#thought_tokens: 5\n" in text and "#seq_length: 48\n" in text, "the embedded default has its own"
    assert main(["train", "--model", "a", "--dataset", "b", "--print-config", "full"]) == 0
    text = capsys.readouterr().out
    assert "#thought_tokens: 8\n" in text and "#seq_length: 256\n" in text
    assert list(tmp_path.iterdir()) == []


def test_a_default_that_is_not_as_good_as_nothing_is_printed(capsys):
    flags = [
        "--model",
        "a",
        "--dataset",
        "b",
        "--thought-tokens",
        "8",
        "--output-dir",
        "runs/quiet-star",
        "--seed",
        "42",
    ]
    assert main(["train", *flags, "--print-config"]) == 0
    assert capsys.readouterr().out == 'model: "a"\ndataset: "b"\nthought_tokens: 8\noutput_dir: "runs/quiet-star"\n'


def test_a_run_that_would_be_refused_is_not_printed(capsys):
    assert main(["train", "--torch-compile", "--print-config"]) == 1
    assert capsys.readouterr().err.startswith("qstar train: torch_compile is True, but it must be left alone")


def test_the_help_says_what_paths_are_relative_to(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "Paths in it are relative to the working directory" in " ".join(capsys.readouterr().out.split())


def test_the_files_on_the_page_about_settings_are_read(tmp_path, called):
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "settings.md").read_text(), re.DOTALL | re.MULTILINE)
    block, curriculum = blocks
    (tmp_path / "curriculum.yaml").write_text(f"model: a\ndataset: b\n{curriculum}")
    assert main(["train", "--config", str(tmp_path / "curriculum.yaml")]) == 0
    stages = read_stages(called["train"]["stages"]).stages
    assert stages == (
        Stage(steps=150),
        Stage(steps=150, thought_tokens=12, ahead_tokens=4),
        Stage(steps=150, thought_tokens=8, learning_rate=5e-7),
        Stage(steps=100, distil=True),
    )
    (tmp_path / "run.yaml").write_text(block)
    assert main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    given = called["train"]
    assert given["learning_rate"] == 1e-6 and given["bf16"] is True and given["save_strategy"] == "no"
    assert given["lr_scheduler_kwargs"] == {"min_lr": 1e-7}
