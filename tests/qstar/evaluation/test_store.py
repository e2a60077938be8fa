"""Answers on disk: what is there is taken up, wherever a kill has cut the file."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
import tiny
import tiny_folder
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from qstar.evaluation.report import Answered
from qstar.evaluation.store import AnswerStore, model_identity, store_path
from qstar.wrapping import wrap

ANSWERS = {
    4: Answered(True, 0.25, -1.5, "18", {"thoughts": ["é ⟨a⟩", "two\nlines"]}),
    0: Answered(False, None, None, None, {}),
    2: Answered(True, 0.1 + 0.2, -inf, "B"),
}
HEADER = {"task": "sums", "questions": "0123", "row": "own", "settings": {"temperature": 0.5, "repeats": [1, 2]}}


def written(path: Path) -> None:
    with AnswerStore(path, HEADER) as store:
        for place, answer in ANSWERS.items():
            store.add(place, answer)


def test_what_was_answered_is_there_again(tmp_path):
    path = tmp_path / "made" / "sums.jsonl"
    written(path)
    with AnswerStore(path, HEADER) as store:
        assert {place: store[place] for place in store} == ANSWERS
        assert len(store) == 3 and 2 in store and 3 not in store
        store.add(3, ANSWERS[0])
    with AnswerStore(path, HEADER) as store:
        assert [*store] == [4, 0, 2, 3] and store[3] == ANSWERS[0]


def test_a_file_cut_anywhere_is_gone_on_with(tmp_path):
    """After each byte: answers whose lines are whole are kept, the others made again, and the file is whole."""
    path = tmp_path / "sums.jsonl"
    written(path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    ends = [sum(map(len, lines[: number + 1])) for number in range(len(lines))]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        kept = [*ANSWERS][: max(0, sum(end <= length for end in ends) - 1)]
        with AnswerStore(path, HEADER) as store:
            assert [*store] == kept
            for place, answer in ANSWERS.items():
                if place not in store:
                    store.add(place, answer)
        assert path.read_bytes() == whole


def test_an_answer_outlives_the_process_that_was_killed_behind_it(tmp_path):
    code = f"""
import os, signal
from qstar.evaluation.report import Answered
from qstar.evaluation.store import AnswerStore
store = AnswerStore({str(tmp_path / "a.jsonl")!r}, {HEADER!r})
store.add(7, Answered(True, said="18"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    with AnswerStore(tmp_path / "a.jsonl", HEADER) as store:
        assert store[7] == Answered(True, said="18")


@pytest.mark.parametrize(
    "change, what",
    [
        (dict(questions="4567"), "questions was '0123' and is '4567'"),
        (dict(settings=dict(temperature=1.0, repeats=[1, 2])), r"settings.temperature was 0\.5 and is 1\.0"),
        (dict(settings=dict(repeats=[1])), r"settings.repeats was \[1, 2\] and is \[1\], settings.temperature was 0.5"),
        (dict(model="new"), "model was missing and is 'new'"),
        (dict(version=2), "version was 1 and is 2"),
    ],
)
def test_answers_that_were_made_otherwise_are_refused_and_kept(tmp_path, change, what):
    path = tmp_path / "sums.jsonl"
    written(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"holds answers that were made otherwise: .*{what}"):
        AnswerStore(path, HEADER | change)
    assert path.read_bytes() == before


@pytest.mark.parametrize("line", [b"{", b"[1]", b'{"right": true}', b'{"place": 1, "wrong": true}', b"\0\0\0"])
def test_a_damaged_line_is_named_and_nothing_lost(tmp_path, line):
    path = tmp_path / "sums.jsonl"
    written(path)
    whole = path.read_bytes() + line + b"\n"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"line 5 of .*sums.jsonl is damaged"):
        AnswerStore(path, HEADER)
    assert path.read_bytes() == whole


def test_every_row_has_a_file_of_its_own(tmp_path):
    names = [
        ("gsm8k", "with its thoughts"),
        ("gsm8k", "with-its thoughts"),
        ("a/../b", "x" * 300),
        ("gsm8k-with", "its"),
    ]
    paths = [store_path(tmp_path, *each) for each in names]
    assert len(set(paths)) == 4 and all(each.parent == tmp_path for each in paths)
    assert paths[0].name.startswith("gsm8k-with-its-thoughts-")
    for path in paths:
        AnswerStore(path, HEADER).__exit__(None, None, None)


def test_a_folder_is_known_by_its_weights_and_its_words(tmp_path):
    folder = tiny_folder.thinking_folder(tmp_path / "a")
    identity = model_identity(folder)
    [name] = [path.name for path in folder.glob("*.safetensors")]
    assert identity["files"][name] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert {name, "qstar/mixing_head.safetensors", "qstar_config.json", "tokenizer.json"} <= identity["files"].keys()
    (folder / "eval.json").write_text("{}")
    os.utime(folder / name)
    assert model_identity(str(folder)) == identity
    for changed in (f"{folder}/qstar/mixing_head.safetensors", f"{folder}/tokenizer.json"):
        before = Path(changed).read_bytes()
        Path(changed).write_bytes(before + b" ")
        assert model_identity(folder) != identity
        Path(changed).write_bytes(before)
    assert model_identity(folder) == identity


def test_adapters_are_known_with_their_base(tmp_path):
    base = tiny_folder.base_folder(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model = wrap(model, tiny.tokenizer(), thought_tokens=2, check=False)
    model.save_pretrained(tmp_path / "lora")
    assert model_identity(tmp_path / "lora")["base"] == model_identity(base)


def test_a_model_of_the_hub_is_known_by_its_name_and_revision(tmp_path):
    assert model_identity("some/model", "abc") == {"hub": "some/model", "revision": "abc"}
    with pytest.raises(FileNotFoundError, match="holds no safetensors"):
        model_identity(tmp_path)
