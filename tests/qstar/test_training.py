"""Training: the whole job on tiny models and local files, its metrics, resuming, and errors."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers.trainer import TRAINER_STATE_NAME

from qstar import evaluate, load, reference, train, train_embedded
from qstar.commands.main import main
from qstar.data import PadRight
from qstar.experimental import cuda_graph
from qstar.grid import Text
from qstar.learning import Objective
from qstar.talking import talk
from qstar.training.checkpoints import last_whole_checkpoint
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

QUIET = dict(
    report_to="none", disable_tqdm=True, sample_steps=0, gradient_norm_steps=0, save_strategy="no", seq_length=12
)


def texts(count: int = 24) -> Dataset:
    rng = random.Random(0)
    lines = [" ".join(rng.choice("abcdef") for _ in range(rng.randint(3, 20))) for _ in range(count)]
    return Dataset.from_dict({"text": lines})


def tiny_train(output_dir, dataset=None, model=None, **settings):
    options = QUIET | dict(
        thought_tokens=2, ahead_tokens=2, batch_size=2, learning_rate=1e-3, max_steps=3, warmup_steps=0
    )
    model = tiny.plain_model("llama") if model is None else model
    return train(
        model,
        texts() if dataset is None else dataset,
        tokenizer=tiny.tokenizer(),
        output_dir=output_dir,
        **(options | settings),
    )


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    tiny_train(tmp_path / "cut", **options)
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-2"), **options)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("killed_in", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize("at_save", [1, 2])
def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(tmp_path, monkeypatch, killed_in, at_save):
    """Also where the checkpoint replaces one of an earlier life of the run."""
    options = dict(max_steps=5, save_strategy="steps", save_steps=2)
    whole = tiny_train(tmp_path / "whole", **options).model.state_dict()
    original, saves = getattr(QuietStarTrainer, killed_in), []

    def killed(trainer, *args, **kwargs):
        saves.append(trainer.state.global_step)
        if len(saves) == at_save:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    (tmp_path / "cut" / "checkpoint-4" / TRAINER_STATE_NAME).write_text("{")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(QuietStarTrainer, killed_in, killed)
        tiny_train(tmp_path / "cut", resume_from_checkpoint=True, **options)
    assert last_whole_checkpoint(tmp_path / "cut") == (None if at_save == 1 else tmp_path / "cut" / "checkpoint-2")
    resumed = tiny_train(tmp_path / "cut", resume_from_checkpoint=True, **options).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert last_whole_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-5"


def test_a_checkpoint_that_replaces_another_is_not_whole_before_its_end(tmp_path, monkeypatch):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    tiny_train(tmp_path, **options)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(QuietStarTrainer, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, resume_from_checkpoint=tmp_path / "checkpoint-2", **options)
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_accumulated_batches_equal_one_batch(tmp_path):
    """The same rows as one batch of four or as two of two: the same thoughts, the same gradient."""
    rows = [{"input_ids": tiny.text(1, 10, seed)[0].tolist(), "position_ids": list(range(10))} for seed in range(4)]
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    gradients, drawn = [], []
    for size in (4, 2):
        args = QuietStarArguments(str(tmp_path), per_device_train_batch_size=size, **(QUIET | dict(seq_length=10)))
        trainer = QuietStarTrainer(model, args, train_dataset=rows)
        model.zero_grad()
        thoughts = []
        for begin in range(0, 4, size):
            batch = PadRight()(rows[begin : begin + size])
            loss, output = trainer.compute_loss(model, batch, return_outputs=True)
            (loss * size / 4).backward()
            thoughts.append(output.thoughts)
        drawn.append(torch.cat(thoughts))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*drawn)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_learning_rates_of_the_new_parameters(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    args = QuietStarArguments(
        str(tmp_path), learning_rate=1e-3, mixing_head_lr_factor=10, thought_embedding_lr_factor=100, **QUIET
    )
    optimizer = QuietStarTrainer(model, args).create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates[id(model.qstar_mixing_head.output.weight)] == pytest.approx(1e-2)
    assert rates[id(model.qstar_start)] == rates[id(model.qstar_end)] == pytest.approx(1e-1)
    assert rates[id(model.lm_head.weight)] == pytest.approx(1e-3)


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


def test_trainer_evaluates_held_out_text(tmp_path):
    result = tiny_train(tmp_path / "run", eval_dataset=texts(4), eval_strategy="steps", eval_steps=2, max_steps=2)
    evaluated = [record for record in records(result.folder) if "eval_nll_talk" in record]
    assert evaluated[0]["eval_gain"] == pytest.approx(evaluated[0]["eval_nll_base"] - evaluated[0]["eval_nll_talk"])
    expected = evaluate(result.model, result.tokenizer, texts(4), seq_length=12)
    assert evaluated[-1]["eval_nll_talk"] == pytest.approx(expected.nll_talk, rel=1e-5)


def test_training_in_bfloat16_autocast_keeps_scores_in_float32():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Objective()(model, tiny.text(1, 8))
    assert output.loss.dtype == output.nll_talk.dtype == torch.float32
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    exact = Objective()(model, tiny.text(1, 8), thoughts=output.thoughts)
    assert float(output.nll_base) == pytest.approx(float(exact.nll_base), rel=0.05)


def test_a_float32_head_beside_16_bit_states_keeps_its_products():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    head = model.language_head()
    hidden = torch.randn(5, model.config.hidden_size).bfloat16()
    targets = torch.arange(4, 9)
    assert head.dtype == torch.float32
    expected = reference.logits(model, hidden.float()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(head.log_prob(hidden, targets), expected)
    torch.testing.assert_close(head.log_prob_sum(hidden, targets, torch.ones(5))[1], expected)


def test_rewards_in_bfloat16_autocast_are_those_of_float32():
    """A young mixing head weighs thoughts by far less than bfloat16 resolves: rewards must not drown in rounding."""
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.mul_(1e-3)
    text, grid = Text.from_inputs(tiny.text(4, 24)), model.grid(24)
    thoughts = tiny.random_thoughts(model, 4, 24)
    objective = Objective(signed=True)
    exact = objective.advantage(talk(model, text, grid, thoughts), grid)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = objective.advantage(talk(model, text, grid, thoughts), grid)
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rounded.flatten()]))[0, 1]) > 0.99


def test_labels_are_padded_and_other_columns_refused():
    batch = PadRight()([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert sorted(batch) == ["attention_mask", "input_ids", "labels"]
    with pytest.raises(ValueError, match="rows hold 'text'"):
        PadRight()([{"input_ids": [5], "text": "a"}])


def test_a_stream_of_unknown_columns(tmp_path):
    stream = IterableDataset.from_generator(lambda: ({"id": i, "text": "a b c d e f"} for i in range(40)))
    assert stream.column_names is None
    assert tiny_train(tmp_path / "run", stream, max_steps=1).metrics["step"] == 1
    with pytest.raises(ValueError, match="text_column is 'body', but the dataset has 'id', 'text'"):
        tiny_train(tmp_path / "other", stream, text_column="body", max_steps=1)


def test_a_thought_token_in_the_text_is_read_but_not_learned(tmp_path):
    data = Dataset.from_dict({"text": ["a b <|startthought|> c d e f"] * 4})
    assert tiny_train(tmp_path / "run", data, max_steps=1).metrics["step"] == 1


def test_batches_of_other_lengths_share_no_row_number(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    args = QuietStarArguments(str(tmp_path), per_device_train_batch_size=2, **QUIET)
    trainer = QuietStarTrainer(model, args)
    taken = []
    for length in (12, 5, 12, 7):
        offset = trainer._objective_for(torch.zeros(2, length)).row_offset
        taken += range(offset, offset + 2 * length * model.qstar.rationales)
    assert len(taken) == len(set(taken))


def test_held_out_text_is_evaluated_at_the_end(tmp_path):
    result = tiny_train(tmp_path / "run", eval_dataset=texts(4))
    expected = evaluate(result.model, result.tokenizer, texts(4), seq_length=12)
    assert records(result.folder)[-1]["eval_nll_talk"] == pytest.approx(expected.nll_talk, rel=1e-5)


def test_a_graph_is_refused_without_a_gpu(tmp_path):
    why = "cuda_graph is enabled, but thinking cannot be captured: the text is on cpu"
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    cuda_graph.enable(model)
    with pytest.raises(ValueError, match=why):
        train(
            model, texts(), tokenizer=tiny.tokenizer(), output_dir=tmp_path / "run", max_steps=1, use_cpu=True, **QUIET
        )
    trainer = QuietStarTrainer(model, QuietStarArguments(str(tmp_path), use_cpu=True, **QUIET))
    with pytest.raises(ValueError, match=why):
        trainer.evaluate([dict(input_ids=[5, 6, 7], position_ids=[0, 1, 2])])


def test_the_embedded_default_refuses_what_it_would_ignore():
    with pytest.raises(ValueError, match="resume_from_checkpoint is True, but the embedded default takes none"):
        train_embedded(resume_from_checkpoint=True)


def test_weights_of_16_bits_are_warned_of(tmp_path, caplog):
    model = tiny.thinking_model(dtype=torch.bfloat16, thought_tokens=2, ahead_tokens=1)
    QuietStarTrainer(model, QuietStarArguments(str(tmp_path), **QUIET))
    assert "weights that learn are 16-bit" in caplog.text


def test_padding_of_short_rows():
    batch = PadRight(9)([{"input_ids": [5, 6, 7], "position_ids": [0, 1, 2]}, {"input_ids": [8], "position_ids": [0]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert Text.from_inputs(**batch).targets.tolist() == [[6, 7, -100], [-100, -100, -100]]


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


def test_eval_command(tmp_path, capsys):
    result = tiny_train(tmp_path / "run")
    texts(4).to_json(tmp_path / "test.jsonl")
    assert main(["eval", str(result.folder), "--dataset", str(tmp_path / "test.jsonl"), "--seq-length", "12"]) == 0
    printed = capsys.readouterr().out
    written = json.loads((result.folder / "eval.json").read_text())
    expected = evaluate(result.model, result.tokenizer, texts(4), seq_length=12)
    assert written["nll_talk"] == pytest.approx(expected.nll_talk)
    assert f"{-expected.nll_base_ahead[0]:.4f}" in printed
    assert f"{-expected.nll_talk_ahead[1]:.4f}" in printed


def test_commands_say_what_is_wrong(tmp_path, capsys):
    assert main([]) == 2
    assert main(["traim"]) == 2
    assert "unknown command 'traim'" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--dataset", "x"]) == 1
    assert "not the folder of a Quiet-STaR model" in capsys.readouterr().err
