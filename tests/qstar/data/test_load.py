"""Names and paths: what they stand for, what they could not, and what looks nothing up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tiny
from datasets import Dataset, DatasetDict

from qstar.data import load, load_texts


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.jsonl", "there is no such file or folder"),
        ("./data", "there is no such file or folder"),
        (Path("data"), "there is no such file or folder"),
        ("my data", "it could be no name on the hub"),
        ("some/long/path", "it could be no name on the hub"),
    ],
)
def test_a_name_that_is_nothing_here_and_could_be_nothing_on_the_hub(name, message, monkeypatch):
    monkeypatch.setattr(load, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=f"dataset is {re.escape(repr(str(name)))}, but .*{message}"):
        load_texts(name)


def test_a_name_that_the_hub_does_not_know_is_told_from_a_path(monkeypatch):
    def unknown(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr(load, "load_dataset", unknown)
    with pytest.raises(FileNotFoundError, match=r"'opne/math', but .* no such file or folder here, and on the hub: no"):
        load_texts("opne/math")


def test_configuration_and_split_reach_the_hub(monkeypatch):
    calls = []
    monkeypatch.setattr(load, "load_dataset", lambda *names, **options: calls.append((names, options)))
    load_texts("some/data", "validation", config="small")
    assert calls == [(("some/data", "small"), dict(split="validation", streaming=True))]


def test_a_configuration_and_a_split_are_refused_where_there_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for dataset in (str(tmp_path / "a.txt"), Dataset.from_dict({"text": ["a"]})):
        with pytest.raises(ValueError, match="the configuration of dataset is 'small', but only a hub dataset or"):
            load_texts(dataset, config="small")
        with pytest.raises(ValueError, match=r"the split of eval_dataset is 'train\[:1\]', but a file or a"):
            load_texts(dataset, "train[:1]", name="eval_dataset")


def test_folders_are_read_as_they_were_saved(tmp_path):
    data = Dataset.from_dict({"text": ["a", "b"]})
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    data.to_json(tmp_path / "files" / "train.jsonl")
    assert load_texts(tmp_path / "one")["text"][:] == ["a", "b"]
    assert load_texts(str(tmp_path / "two"), "test")["text"][:] == ["b"]
    assert [row["text"] for row in load_texts(tmp_path / "files")] == ["a", "b"]


@pytest.mark.slow
def test_local_files_and_models_look_nothing_up_on_the_network(tmp_path):
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("a b c d\n\ne f g h")
    (tmp_path / "a.jsonl").write_text('{"text": "a b c d"}')
    Dataset.from_dict({"text": ["a b"]}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_text('{"text": "a b c d"}')
    code = """
import os, socket
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
asked = []
def refuse(*arguments, **options):
    asked.append(arguments)
    raise OSError("no network here")
socket.getaddrinfo = socket.socket.connect = refuse
from qstar import train
from qstar.data import load_texts
for name in ("a.txt", "a.jsonl", "a.parquet"):
    print(load_texts(name).num_rows)
print(next(iter(load_texts("files")))["text"])
options = dict(max_steps=1, seq_length=8, use_cpu=True, report_to="none", sample_steps=0, gradient_norm_steps=0)
train("model", "a.txt", output_dir="run", eval_dataset="a.jsonl", save_strategy="no", **options)
print("asked", asked)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:4] == ["2", "1", "1", "a b c d"] and lines[-1] == "asked []"
