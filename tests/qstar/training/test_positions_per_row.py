"""Training that thinks at some positions of each row: an update is the same however its rows are split."""

from __future__ import annotations

import pyarrow.parquet
import pytest
import tiny
import torch
from tiny_runs import QUIET, records, texts, tiny_train, unequal_rows

from qstar.commands.main import main
from qstar.data import PadRight
from qstar.grid import IGNORED, ThoughtGrid
from qstar.talking import read_batch
from qstar.thinking import choose_positions
from qstar.training.dry_run import dry_run
from qstar.training.memory import training_advice
from qstar.training.settings import QuietStarArguments
from qstar.training.thought_statistics import ThoughtStatistics
from qstar.training.trainer import LOGGED, QuietStarTrainer

ROWS, LENGTH, CHOSEN = 4, 12, 4


def arguments(folder, **settings) -> QuietStarArguments:
    options = QUIET | dict(train_sampling_strategy="sequential", max_grad_norm=1e9, optim="sgd", learning_rate=0.1)
    options |= dict(logging_steps=1, warmup_steps=0, max_steps=2, per_device_train_batch_size=ROWS)
    return QuietStarArguments(str(folder), **(options | dict(positions_per_row=CHOSEN) | settings))


class Watched(QuietStarTrainer):
    """Keeps what every batch thought, and where."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, output = super().compute_loss(model, inputs, return_outputs=True)
        self.seen.append((self.state.global_step, inputs, output))
        return (loss, output) if return_outputs else loss


def trained(folder, rows=None, model=None, **settings) -> Watched:
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2) if model is None else model
    trainer = Watched(model, arguments(folder, **settings), train_dataset=unequal_rows() if rows is None else rows)
    trainer.train()
    return trainer


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_update_from_some_positions_is_the_same_however_it_is_split(batch_size, tmp_path):
    """The same positions and thoughts, the same weights, and the same values in the log."""
    whole = trained(tmp_path / "whole")
    accumulated = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=ROWS // batch_size)
    split = trained(tmp_path / "split", **accumulated)
    for name in ("positions", "thoughts"):
        ours, theirs = (torch.cat([getattr(output, name) for *_, output in each.seen]) for each in (split, whole))
        assert ours.shape[:2] == (2 * ROWS, CHOSEN) and torch.equal(ours, theirs), name
    start = tiny.thinking_model(thought_tokens=2, ahead_tokens=2).state_dict()
    ours, theirs = (each.model.state_dict() for each in (split, whole))
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-4 * (weight - start[name]).norm(), name
    assert not torch.equal(theirs["lm_head.weight"], start["lm_head.weight"])
    logs = zip(records(tmp_path / "split"), records(tmp_path / "whole"), strict=True)
    for ours, theirs in ((ours, theirs) for ours, theirs in logs if "loss" in theirs):
        for name in ("loss", *LOGGED, "thought_entropy", "distinct_thoughts"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_means_are_over_what_counts_at_the_chosen_positions(tmp_path):
    """What the log says of an update in two batches, counted by hand from what was scored."""
    trainer = trained(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1)
    counts = torch.zeros(4, dtype=torch.int64)
    for number, (step, inputs, output) in enumerate(trainer.seen):
        text = read_batch(trainer.thinking_model, **inputs)
        offset = number * 2 * LENGTH * 2  # rows, positions, rationales of the batches before
        grid = choose_positions(text, ThoughtGrid(LENGTH, 2, 2, 2), CHOSEN, seed=(42 << 32) + step, row_offset=offset)
        assert torch.equal(output.positions, grid.chosen)
        counted = text.talk_targets(grid) != IGNORED
        text_tokens = (text.targets != IGNORED).sum()
        counts += torch.cat([text_tokens[None], counted.sum((0, 1)), counted.all(-1).sum()[None]])
    assert trainer.counts is not None and torch.equal(trainer.counts.stacked(), counts)


def test_every_step_thinks_at_other_positions_and_a_resumed_run_at_the_same(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    chosen = [output.positions for *_, output in whole.seen]
    assert len({tuple(x.flatten().tolist()) for x in chosen}) == 4
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    args = arguments(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    again = Watched(model, args, train_dataset=unequal_rows())
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (*_, ours), expected in zip(again.seen, chosen[2:], strict=True):
        assert torch.equal(ours.positions, expected)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


def test_as_many_positions_as_a_row_has_train_as_ever(tmp_path):
    every, none = (
        trained(tmp_path / str(count), positions_per_row=count).model.state_dict() for count in (LENGTH, None)
    )
    assert all(torch.equal(every[name], weight) for name, weight in none.items())


def test_statistics_are_of_the_thoughts_at_chosen_positions_of_text(tmp_path):
    """Those about padding are left out: rows that are shorter than the batch's are filled up."""
    long, short = unequal_rows()[:2]
    rows = [long, {name: values[:3] for name, values in short.items()}]
    trainer = trained(tmp_path, rows, per_device_train_batch_size=2, max_steps=1)
    ((_, inputs, output),) = trainer.seen
    holds_text = inputs["attention_mask"].bool().gather(1, output.positions)
    assert 0 < holds_text.sum() < holds_text.numel()
    statistics = ThoughtStatistics()
    statistics.add(output.thoughts, holds_text, trainer.thinking_model.config.vocab_size)
    expected = statistics.summary()
    logged = next(record for record in records(tmp_path) if "loss" in record)
    assert {name: logged[name] for name in expected} == pytest.approx(expected)


def test_thoughts_that_are_shown_stand_at_their_positions(tmp_path):
    """In the log and in the table, each between the text before it and after it."""
    tokenizer, model = tiny.tokenizer(), tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    args = arguments(tmp_path, sample_steps=1, max_steps=1, learning_rate=0.0)
    rows = unequal_rows()[1:2] * ROWS
    trainer = Watched(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    ((_, inputs, output),) = trainer.seen
    table = pyarrow.parquet.read_table(tmp_path / "thoughts").to_pylist()
    positions, ids = output.positions[0].tolist(), inputs["input_ids"][0]
    assert [row["position"] for row in table[::2]] == positions
    for row in table:
        i, thought = row["position"], output.thoughts[0, positions.index(row["position"]), row["rationale"]]
        assert row["before"] == tokenizer.decode(ids[: i + 1]) and row["after"] == tokenizer.decode(ids[i + 1 : i + 3])
        assert row["thought"] == tokenizer.decode(thought)
    shown = next(record["thoughts"] for record in records(tmp_path) if "thoughts" in record)
    assert [each["thought"] for each in shown] == [tokenizer.decode(output.thoughts[0, i, 0]) for i in (1, 2, 3)]
    assert [each["before"] for each in shown] == [tokenizer.decode(ids[: positions[i] + 1]) for i in (1, 2, 3)]


def test_held_out_text_is_thought_about_everywhere(tmp_path):
    held_out = unequal_rows()[:2]
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    found = [
        QuietStarTrainer(model, arguments(tmp_path, positions_per_row=count), eval_dataset=held_out).evaluate()
        for count in (CHOSEN, None)
    ]
    same = [name for name in found[0] if "nll" in name or "tokens" in name]
    assert same and all(found[0][name] == found[1][name] for name in same)


def test_a_run_of_the_command_line_thinks_where_it_is_told(tmp_path):
    result = tiny_train(tmp_path / "run", positions_per_row=3, logging_steps=1)
    assert any("loss" in record for record in records(tmp_path / "run")) and result.model.qstar.thought_tokens == 2
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    texts().to_json(tmp_path / "texts.jsonl")
    flags = f"train --model {tmp_path / 'model'} --dataset {tmp_path / 'texts.jsonl'} --output-dir {tmp_path / 'b'} "
    flags += "--thought-tokens 2 --ahead-tokens 2 --batch-size 2 --learning-rate 1e-3 --max-steps 3 --warmup-steps 0 "
    flags += "--positions-per-row 3 --logging-steps 1 --seq-length 12 --sample-steps 0 --gradient-norm-steps 0 "
    flags += "--save-strategy no --report-to none --curves no"
    assert main(flags.split()) == 0
    ours, theirs = ([r for r in records(tmp_path / name) if "loss" in r] for name in ("b", "run"))
    assert ours and [r["loss"] for r in ours] == [r["loss"] for r in theirs]


def test_a_dry_run_counts_the_tokens_of_chosen_positions(tmp_path):
    tiny.plain_model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    texts().to_json(tmp_path / "texts.jsonl")
    settings = QUIET | dict(thought_tokens=2, ahead_tokens=1, batch_size=2, use_cpu=True)
    named = dict(model=str(tmp_path / "model"), dataset=str(tmp_path / "texts.jsonl"), output_dir=str(tmp_path / "run"))
    said = dry_run(**settings, **named, positions_per_row=5)
    assert said.grid == said.at_once == 2 * (12 + 5 * 2 * 4)
    assert dry_run(**settings, **named).grid == 2 * (12 + 12 * 2 * 4)


def test_a_step_that_does_not_fit_may_think_at_fewer_positions(tmp_path):
    args = arguments(tmp_path, positions_per_row=8, per_device_train_batch_size=2, max_grid_tokens=0)
    advice = training_advice(args, ThoughtGrid(12, 2, 8, 4), None)
    assert f"max_grid_tokens={12 + 8 * 26} (a pass holds {2 * (12 + 8 * 26)} tokens of text and thoughts)" in advice
    assert "positions_per_row=4 (now 8)" in advice


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "positions_per_row is 0, but it must be an integer of at least 1, or None"),
        (-1, "positions_per_row is -1, but it must be an integer of at least 1, or None"),
        (True, "positions_per_row is True, but it must be an integer of at least 1, or None"),
        (2.5, "positions_per_row is 2.5, but it must be an integer of at least 1, or None"),
        (13, "positions_per_row is 13, but it must be at most the 12 of seq_length; None is all of a row"),
    ],
)
def test_a_wrong_number_of_positions_is_refused(value, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, positions_per_row=value)
    assert str(caught.value) == message


def test_chosen_positions_are_not_for_deepspeed(tmp_path):
    class OfDeepSpeed(QuietStarTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(ValueError, match="positions_per_row is 4, but with DeepSpeed it must be None"):
        OfDeepSpeed(tiny.thinking_model(), arguments(tmp_path), train_dataset=unequal_rows())


def test_padded_rows_draw_from_their_text_alone():
    """Rows that a batch fills up on the right: padding is chosen only where text gives out."""
    rows = [{"input_ids": tiny.text(1, n)[0].tolist(), "position_ids": list(range(n))} for n in (12, 7, 4)]
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    batch = PadRight()(rows)
    text = read_batch(model, **batch)
    for seed in range(20):
        chosen = choose_positions(text, model.grid(12), CHOSEN, seed=seed).chosen
        assert (chosen[0] < 10).all() and (chosen[1] < 5).all() and {0, 1} <= set(chosen[2].tolist())
