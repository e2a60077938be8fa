"""The whole job on tiny models and local files: what it saves, what it takes, and what it refuses."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tiny_runs import QUIET, records, texts, tiny_train

from qstar import evaluate, load, train


def test_train_saves_all_that_load_needs(tmp_path):
    result = tiny_train(tmp_path / "run", logging_steps=1, sample_steps=2, gradient_norm_steps=1)
    logged = [record for record in records(result.folder) if "loss" in record]
    assert [record["step"] for record in logged] == [1, 2, 3]
    for name in ("nll_base", "nll_talk", "policy_loss", "reward", "mixing_weight", "likelihood_gradient_norm"):
        assert all(name in record for record in logged), name
    assert logged[0]["likelihood_loss"] == pytest.approx((logged[0]["nll_base"] + logged[0]["nll_talk"]) / 2, rel=1e-5)
    sampled = [record for record in records(result.folder) if "thoughts" in record]
    assert [record["step"] for record in sampled] == [0, 2]
    assert len(sampled[0]["thoughts"][0]["thought"].split()) == 2

    model, tokenizer = load(result.folder)
    for (name, ours), other in zip(model.state_dict().items(), result.model.state_dict().values(), strict=True):
        assert torch.equal(ours, other), name
    once, twice = (evaluate(model, tokenizer, texts(), seq_length=12) for _ in range(2))
    assert once == twice
    assert once == evaluate(result.model, result.tokenizer, texts(), seq_length=12)
    assert json.loads((result.folder / "training_args.json").read_text())["seq_length"] == 12


def test_training_lowers_the_loss(tmp_path):
    before = evaluate(
        tiny.thinking_model(mixing=False, thought_tokens=2, ahead_tokens=2), tiny.tokenizer(), texts(), seq_length=12
    )
    result = tiny_train(tmp_path / "run", max_steps=30, learning_rate=1e-2)
    after = evaluate(result.model, result.tokenizer, texts(), seq_length=12)
    assert after.nll_base < before.nll_base - 0.5
    assert after.nll_talk < before.nll_talk - 0.5


def test_the_same_seed_trains_the_same_model(tmp_path):
    runs = [tiny_train(tmp_path / name, seed=3).model.state_dict() for name in ("a", "b")]
    other = tiny_train(tmp_path / "c", seed=4).model.state_dict()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], other[name]) for name in other)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "dict"])
def test_datasets_of_every_kind(kind, tmp_path):
    data = texts()
    path = tmp_path / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(data["text"]))
    elif kind == "jsonl":
        data.to_json(path)
    elif kind == "parquet":
        data.to_parquet(path)
    dataset = DatasetDict({"train": data}) if kind == "dict" else str(path)
    assert tiny_train(tmp_path / "run", dataset, max_steps=1).metrics["step"] == 1


def test_a_streamed_dataset(tmp_path):
    stream = texts().to_iterable_dataset()
    assert tiny_train(tmp_path / "run", stream, max_steps=2).metrics["step"] == 2
    with pytest.raises(ValueError, match="max_steps is -1, but a streamed dataset has no length"):
        tiny_train(tmp_path / "other", stream, max_steps=-1)


def test_a_trained_folder_trains_on_with_other_lengths(tmp_path):
    first = tiny_train(tmp_path / "first")
    second = train(
        first.folder, texts(), output_dir=tmp_path / "second", thought_tokens=3, max_steps=1, batch_size=2, **QUIET
    )
    assert (second.model.qstar.thought_tokens, second.model.qstar.ahead_tokens) == (3, 2)


def test_a_stream_of_unknown_columns(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"id": i, "text": "a b c d e f"} for i in range(40)))
    assert stream.column_names is None
    assert tiny_train(tmp_path / "run", stream, max_steps=1).metrics["step"] == 1
    with pytest.raises(ValueError, match="text_column is 'body', but the dataset has 'id', 'text'"):
        tiny_train(tmp_path / "other", stream, text_column="body", max_steps=1)


def test_a_thought_token_in_the_text_is_read_but_not_learned(tmp_path):
    data = Dataset.from_dict({"text": ["a b <|startthought|> c d e f"] * 4})
    assert tiny_train(tmp_path / "run", data, max_steps=1).metrics["step"] == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(max_step=3), TypeError, "no setting 'max_step'; did you mean 'max_steps'"),
        (dict(text_column="body"), ValueError, "text_column is 'body', but the dataset has 'text'"),
        (dict(seq_length=1), ValueError, "seq_length is 1"),
        (dict(dataset="missing.jsonl"), FileNotFoundError, "'missing.jsonl', but there is no such file"),
        (dict(dataset=3), TypeError, "dataset must be a name, a path or a datasets object, but it is int"),
        (dict(thought_tokens=0), ValueError, "thought_tokens is 0"),
        (dict(baseline="median"), ValueError, "baseline is 'median'"),
    ],
)
def test_wrong_arguments_are_named(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        tiny_train(tmp_path / "run", **call)


def test_half_a_call_says_what_is_missing():
    with pytest.raises(ValueError, match="dataset is missing"):
        train("some-model")
    with pytest.raises(ValueError, match="model is missing"):
        train(dataset="some-data")


def test_an_earlier_run_is_not_written_over(tmp_path):
    tiny_train(tmp_path / "run", max_steps=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        tiny_train(tmp_path / "run", max_steps=1)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
