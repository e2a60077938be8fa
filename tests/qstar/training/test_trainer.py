"""The Trainer: what it logs, how it draws, which rates it gives, and what it evaluates."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_runs import QUIET, records, texts, tiny_train, unequal_rows

from qstar import evaluate, train
from qstar.data import PadRight
from qstar.embedded.run import PlainTrainer
from qstar.evaluation.held_out import evaluate_rows
from qstar.experimental import cuda_graph
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import LOGGED, OF_SOME_OBJECTIVES, QuietStarTrainer


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


@pytest.mark.parametrize("kind", [QuietStarTrainer, PlainTrainer])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.5])
def test_an_update_is_the_same_however_it_is_split_into_batches(kind, batch_size, entropy_weight, tmp_path):
    """Two updates of four rows: the same weights, and the same values in the log."""
    results = []
    for size in (4, batch_size):
        model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
        options = QUIET | dict(seq_length=12, logging_steps=1, max_grad_norm=1e9, optim="sgd", learning_rate=0.1)
        args = QuietStarArguments(
            str(tmp_path / f"{kind.__name__}-{size}"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            train_sampling_strategy="sequential",
            max_steps=2,
            warmup_steps=0,
            entropy_weight=entropy_weight,
            **options,
        )
        kind(model, args, train_dataset=unequal_rows()).train()
        results.append((model.state_dict(), [r for r in records(args.folder) if "loss" in r]))
    (whole, whole_log), (split, split_log) = results
    start = tiny.thinking_model(thought_tokens=2, ahead_tokens=2).state_dict()
    for name, weight in whole.items():
        moved = (weight - start[name]).norm()
        assert (split[name] - weight).norm() <= 1e-4 * moved, name
    assert not torch.equal(whole["lm_head.weight"], start["lm_head.weight"])
    assert ("policy_entropy" in whole_log[0]) is (kind is QuietStarTrainer and entropy_weight > 0)
    for ours, theirs in zip(split_log, whole_log, strict=True):
        for name in {"loss", *LOGGED, *OF_SOME_OBJECTIVES} & theirs.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


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


def test_trainer_evaluates_held_out_text(tmp_path):
    result = tiny_train(tmp_path / "run", eval_dataset=texts(4), eval_strategy="steps", eval_steps=2, max_steps=2)
    evaluated = [record for record in records(result.folder) if "eval_nll_talk" in record]
    assert evaluated[0]["eval_gain"] == pytest.approx(evaluated[0]["eval_nll_base"] - evaluated[0]["eval_nll_talk"])
    expected = evaluate(result.model, result.tokenizer, texts(4), seq_length=12)
    assert evaluated[-1]["eval_nll_talk"] == pytest.approx(expected.nll_talk, rel=1e-5)


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


def test_weights_of_16_bits_are_warned_of(tmp_path, caplog):
    model = tiny.thinking_model(dtype=torch.bfloat16, thought_tokens=2, ahead_tokens=1)
    QuietStarTrainer(model, QuietStarArguments(str(tmp_path), **QUIET))
    assert "weights that learn are 16-bit" in caplog.text


def test_every_step_draws_other_thoughts_from_the_same_seed(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    trainer = QuietStarTrainer(model, QuietStarArguments(str(tmp_path), seed=3, **QUIET))
    seeds = []
    for step in (0, 1, 2, 1):
        trainer.state.global_step = step
        seeds.append(trainer._objective_for(torch.zeros(2, 5)).seed)
    assert len(set(seeds)) == 3 and seeds[1] == seeds[3]
    other = QuietStarTrainer(model, QuietStarArguments(str(tmp_path), seed=4, **QUIET))
    assert other._objective_for(torch.zeros(2, 5)).seed not in seeds


def test_held_out_text_is_evaluated_in_the_dtype_of_the_training(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    rows = [{"input_ids": tiny.text(1, 12, seed)[0].tolist(), "position_ids": list(range(12))} for seed in range(4)]
    found = {}
    for bf16 in (False, True):
        trainer = QuietStarTrainer(model, QuietStarArguments(str(tmp_path), use_cpu=True, bf16=bf16, **QUIET))
        found[bf16] = trainer.evaluate(rows)["eval_nll_base"]
    with torch.autocast("cpu", torch.bfloat16):
        batch = PadRight()(rows)
        assert evaluate_rows(model, [batch]).nll_base == pytest.approx(found[True])
    assert evaluate_rows(model, [batch]).nll_base == pytest.approx(found[False])
    assert found[True] != found[False]


def test_one_of_several_gpus_is_taken_and_said(tmp_path, caplog):
    args = QuietStarArguments(str(tmp_path), use_cpu=True, **QUIET)
    args._n_gpu = 2
    QuietStarTrainer(tiny.thinking_model(thought_tokens=2, ahead_tokens=1), args)
    assert args.n_gpu == 1
    assert "training on one of 2 GPUs: start with torchrun" in caplog.text


@pytest.mark.parametrize(("strategy", "times"), [("no", 1), ("steps", 2)])
def test_held_out_text_is_evaluated_as_often_as_asked(strategy, times, tmp_path):
    options = dict(eval_dataset=texts(4), eval_strategy=strategy, max_steps=2)
    result = tiny_train(tmp_path / "run", **options, **(dict(eval_steps=1) if strategy == "steps" else {}))
    assert sum("eval_nll_talk" in record for record in records(result.folder)) == times
