"""What training and evaluation make of data: refused before anything is trained, and resumed where it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import torch
from datasets import Dataset
from tiny_runs import QUIET, texts, tiny_train

from qstar import evaluate, train
from qstar.commands.main import main
from qstar.training import prepare, run

CHAT = "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + ' ' }}{% endfor %}"
EMPTY = Dataset.from_dict({"text": ["", ""]})


@pytest.fixture
def folder(tmp_path):
    """A folder with a model and its tokenizer, beside which the current folder is."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("saved_at", [2, 7, 13])
def test_a_stream_that_is_resumed_goes_on_where_it_was(saved_at, tmp_path):
    """Also beyond its first pass, which here is five batches long, and its second."""
    stream = texts(5).to_iterable_dataset()
    options = dict(max_steps=14, batch_size=2, logging_steps=1)
    whole = tiny_train(tmp_path / "whole", stream, **options)
    tiny_train(tmp_path / "run", stream, **(options | dict(save_strategy="steps", save_steps=saved_at)))
    (tmp_path / "run" / "checkpoint-14" / "trainer_state.json").unlink(missing_ok=True)
    resumed = tiny_train(tmp_path / "run", stream, resume_from_checkpoint=True, **options)
    assert resumed.metrics["step"] == 14
    for (name, ours), theirs in zip(resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("data", [EMPTY, EMPTY.to_iterable_dataset()], ids=["dataset", "stream"])
def test_documents_that_are_all_empty_are_refused_before_the_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "fit", lambda *_: pytest.fail("it trains"))
    with pytest.raises(ValueError, match="dataset holds no token to predict"):
        tiny_train(tmp_path / "run", data)
    with pytest.raises(ValueError, match="eval_dataset holds no token to predict"):
        tiny_train(tmp_path / "run", eval_dataset=data)


def test_an_empty_held_out_file_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "open_model", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no rows"):
        tiny_train(tmp_path / "run", eval_dataset=str(tmp_path / "a.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"eval_dataset is 'b\.jsonl', but there is no such file"):
        tiny_train(tmp_path / "run", eval_dataset="b.jsonl")


@pytest.mark.parametrize("model", ["./model", "/no/such/model", "a model", "one/two/three"])
def test_a_mistyped_model_is_named_before_the_data_are_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "read_texts", lambda *_: pytest.fail("the data are read"))
    with pytest.raises(FileNotFoundError, match=f"model is '{model}', but there is no such file or folder"):
        train(model, texts(), output_dir=tmp_path / "run")


def test_a_mistyped_dataset_is_named_before_a_model_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "open_model", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.setattr("qstar.commands.eval.any_model", lambda *_: pytest.fail("the model is loaded"))
    for command in (["train", "--model", str(folder / "model")], ["eval", str(folder / "model")]):
        for dataset, said in (("held.jsonl", "there is no such file"), ("my data", "could be no name on the hub")):
            assert main([*command, "--dataset", dataset]) == 1
            error = capsys.readouterr().err
            assert f"qstar {command[0]}: dataset is '{dataset}', but" in error and said in error


def test_a_model_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(NotADirectoryError, match="but it must be a folder or a hub name, and this is a file"):
        train(tmp_path / "model.gguf", texts(), output_dir=tmp_path / "run")


def test_the_code_of_a_model_is_not_run_where_someone_answers_yes(folder):
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "model" / "theirs.py").write_text(f"open({str(folder / 'was-here')!r}, 'w')\n")
    (folder / "a.txt").write_text("a b c d")
    code = "from qstar import train; train('./model', 'a.txt', output_dir='run')"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, input="y\n" * 9, capture_output=True, text=True)
    assert done.returncode == 1 and "trust_remote_code" in done.stderr
    assert not (folder / "was-here").exists()


def commands(folder, name: str, content: str, *more: str) -> list[list[str]]:
    """``qstar train`` for a step and ``qstar eval`` of what it made, on a file of this content."""
    (folder / name).write_text(content)
    data = ["--dataset", str(folder / name), "--seq-length", "8", *more]
    quiet = "--use-cpu --max-steps 1 --batch-size 2 --report-to none --sample-steps 0 --gradient-norm-steps 0"
    sizes = "--thought-tokens 2 --ahead-tokens 1 --save-strategy no --disable-tqdm true"
    output = ["--output-dir", str(folder / "run")]
    return [
        ["train", "--model", str(folder / "model"), *data, *output, *quiet.split(), *sizes.split()],
        ["eval", str(folder / "run"), *data],
    ]


@pytest.mark.parametrize(
    "name, content, flags, expected",
    [
        ("a.txt", "a b\nc d e\n", ["--documents", "line"], 2 + 3),
        ("a.txt", "a b\nc d e\n", ["--documents", "file"], 5),
        ("a.jsonl", '{"q": "a b", "r": "c d"}', ["--text-format", "q {q} r {r}"], 6),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "b c"}, {"role": "assistant", "content": "d e"}]}',
            ["--text-column", "messages"],
            3,
        ),
    ],
    ids=["lines", "file", "format", "chat"],
)
def test_train_and_eval_read_as_their_flags_say(name, content, flags, expected, folder):
    """So many tokens are predicted: those of each document but its first, its end among them; of a chat the answer."""
    for command in commands(folder, name, content, *flags):
        assert main(command) == 0
    assert json.loads((folder / "run" / "eval.json").read_text())["tokens"] == expected
    assert json.loads((folder / "run" / "training_args.json").read_text())["documents"] in (*flags, "paragraph")


def test_split_and_configuration_of_both_datasets_are_settings(tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split))
        return texts().to_iterable_dataset()

    monkeypatch.setattr("qstar.data.load.load_dataset", load_dataset)
    options = dict(dataset_config="small", dataset_split="validation", eval_config="large", eval_split="held")
    tiny_train(tmp_path / "run", "some/data", eval_dataset="other/data", max_steps=1, **options)
    assert asked == [("some/data", "small", "validation"), ("other/data", "large", "held")]
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    evaluate(model, tiny.tokenizer(), "some/data", split="held", dataset_config="tiny", max_rows=1, seq_length=8)
    assert asked[2:] == [("some/data", "tiny", "held")]


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(documents="page"), ValueError, "documents is 'page', but it must be 'paragraph', 'line', 'file'"),
        (dict(text_format="{q}", text_column="body"), ValueError, "text_format and text_column 'body' are both given"),
        (dict(text_format="q"), ValueError, "text_format is 'q', but it must name columns in braces"),
        (dict(seq_length=1), ValueError, "seq_length is 1, but it must be an integer of at least 2"),
    ],
)
def test_wrong_settings_of_data_are_named(settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train("some-model", "some-data", output_dir=tmp_path / "run", **QUIET | settings)
    with pytest.raises(error, match=message):
        evaluate(tiny.thinking_model(), tiny.tokenizer(), texts(), **settings)


def test_evaluate_knows_its_settings():
    with pytest.raises(TypeError, match=r"evaluate\(\) has no setting 'text_colum'; did you mean 'text_column'"):
        evaluate(tiny.thinking_model(), tiny.tokenizer(), texts(), text_colum="text")


@pytest.mark.parametrize("documents", ["paragraph", "line", "file"])
def test_a_text_file_of_empty_lines_is_refused(documents, tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n")
    with pytest.raises(ValueError, match=r"a\.txt.* holds no token to predict|a\.txt', but it cannot be read"):
        tiny_train(tmp_path / "run", str(tmp_path / "a.txt"), documents=documents)
