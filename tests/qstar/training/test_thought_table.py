"""The table of thoughts: its log-probabilities against passes over the text alone and over text with one thought."""

from __future__ import annotations

import pyarrow.parquet
import pytest
import tiny
import torch
from datasets import load_dataset
from tiny_runs import QUIET, records, tiny_train, unequal_rows

from qstar import reference
from qstar.training.settings import QuietStarArguments
from qstar.training.thought_table import COLUMNS, POSITIONS, score, thought_rows, write_table
from qstar.training.trainer import QuietStarTrainer


def table(folder) -> list[dict]:
    """What all the files of a run say."""
    return pyarrow.parquet.read_table(folder / "thoughts").to_pylist()


def test_the_rows_say_what_plain_passes_say_of_each_thought():
    """Places are spread over the text; a text of 40 tokens has 37 that three tokens follow."""
    model = tiny.thinking_model("gpt2", dtype=torch.float64, thought_tokens=3, ahead_tokens=3)
    tokens, tokenizer = tiny.text(1, 40)[0], tiny.tokenizer()
    thoughts = tiny.random_thoughts(model, 1, 40)
    spoken = model(tokens[None], thoughts=thoughts, objective=score)
    rows = thought_rows(tokenizer, tokens, thoughts[0], spoken, step=7)
    assert len(rows) == 2 * POSITIONS
    places = [row["position"] for row in rows[::2]]
    assert places[0] == 0 and places[-1] == 37 * 15 // 16 and sorted(set(places)) == places

    model.set_attn_implementation("eager")
    start, end = torch.tensor([[model.qstar.start_token_id], [model.qstar.end_token_id]])
    base = reference.hidden_states(model, tokens)
    for row in rows:
        i, thought = row["position"], thoughts[0, row["position"], row["rationale"]]
        following = tokens[i + 1 : i + 4]
        alone = torch.cat([tokens[: i + 1], start, thought, end, following[:2]])
        after = reference.hidden_states(model, alone)[-3:]
        mixed = torch.stack([reference.mix(model, base[i + k], after[k]) for k in range(3)])
        without, with_it = (
            reference.logits(model, states).log_softmax(-1).gather(-1, following[:, None]).sum().item()
            for states in (base[i : i + 3], mixed)
        )
        assert row["log_prob_base"] == pytest.approx(without, abs=1e-5)
        assert row["log_prob_talk"] == pytest.approx(with_it, abs=1e-5)
        assert row["gain"] == pytest.approx(with_it - without, abs=1e-5)
        assert row["before"] == tokenizer.decode(tokens[max(0, i - 31) : i + 1])
        assert row["thought"] == tokenizer.decode(thought) and row["after"] == tokenizer.decode(following)
        assert row["step"] == 7
    assert len({row["gain"] for row in rows}) > POSITIONS


def test_the_weight_is_the_mean_over_the_text_that_followed():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    tokens, thoughts = tiny.text(1, 9), tiny.random_thoughts(model, 1, 9)
    spoken = model(tokens, thoughts=thoughts, objective=score)
    for row in thought_rows(tiny.tokenizer(), tokens[0], thoughts[0], spoken, step=0):
        weights = spoken.weight[0, row["position"], row["rationale"]]
        assert len(weights) == 2 and row["mixing_weight"] == pytest.approx(weights.mean().item())


def test_only_places_that_are_learned_from_are_in_the_table():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    for row, places in (
        (unequal_rows()[2], [6]),
        (unequal_rows()[3], [0, 1, 2, 5, 6, 7, 8, 9]),
        (unequal_rows()[6], []),
    ):
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        if not places:
            batch["labels"][:] = -100
        thoughts = tiny.random_thoughts(model, 1, 12)
        spoken = model(**batch, thoughts=thoughts, objective=score)
        rows = thought_rows(tiny.tokenizer(), batch["input_ids"][0], thoughts[0], spoken, step=0)
        assert [each["position"] for each in rows[::2]] == places


def test_a_table_that_is_written_is_read_by_pyarrow_and_datasets(tmp_path):
    row = {name: "a b" if field.type == "string" else 1 for name, field in zip(COLUMNS.names, COLUMNS, strict=True)}
    path = write_table([row, row | {"step": 2, "gain": float("nan")}], tmp_path, 50)
    assert path == tmp_path / "thoughts" / "step-000050.parquet"
    write_table([row | {"step": 3}], tmp_path, 100)
    assert table(tmp_path)[0] == row and len(table(tmp_path)) == 3
    assert table(tmp_path)[1]["gain"] != table(tmp_path)[1]["gain"]
    read = load_dataset("parquet", data_files=str(tmp_path / "thoughts" / "*.parquet"), cache_dir=tmp_path / "cache")
    assert read["train"][0] == row


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_writes_a_table_every_so_many_steps_that_says_what_the_model_thought(accumulation, tmp_path):
    """Of the first batch of an update, by the weights that sampled the thoughts."""
    taken = []

    class Taking(QuietStarTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss, output = super().compute_loss(model, inputs, return_outputs=True)
            taken.append((inputs, output.thoughts))
            return loss

    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    options = QUIET | dict(sample_steps=2, max_steps=4, learning_rate=0.0, train_sampling_strategy="sequential")
    args = QuietStarArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=accumulation, **options
    )
    tokenizer = tiny.tokenizer()
    Taking(model, args, train_dataset=unequal_rows() * 2, processing_class=tokenizer).train()
    found = table(tmp_path)
    assert sorted({row["step"] for row in found}) == [0, 2]
    assert [path.name for path in sorted((tmp_path / "thoughts").iterdir())] == [
        "step-000000.parquet",
        "step-000002.parquet",
    ]
    for step in (0, 2):
        inputs, thoughts = taken[step * accumulation]
        spoken = model(**{name: values[:1] for name, values in inputs.items()}, thoughts=thoughts[:1], objective=score)
        expected = thought_rows(tokenizer, inputs["input_ids"][0], thoughts[0], spoken, step)
        assert [row for row in found if row["step"] == step] == expected
        assert expected and expected[0]["thought"] == tokenizer.decode(thoughts[0, expected[0]["position"], 0])


def test_showing_thoughts_changes_no_weight(tmp_path):
    whole = tiny_train(tmp_path / "a", sample_steps=0).model.state_dict()
    shown = tiny_train(tmp_path / "b", sample_steps=1)
    for name, weight in shown.model.state_dict().items():
        assert torch.equal(weight, whole[name]), name
    assert len(list((tmp_path / "b" / "thoughts").iterdir())) == 3
    assert not (tmp_path / "a" / "thoughts").exists()
    assert sum("thoughts" in record for record in records(tmp_path / "b")) == 3


def test_a_text_without_a_place_to_show_leaves_no_table(tmp_path):
    """Its file would be one that `datasets` cannot read."""
    rows = [row | {"labels": [-100] * 12} for row in unequal_rows()[:1]] + unequal_rows()[1:]
    args = QuietStarArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        **(QUIET | dict(sample_steps=1, max_steps=2, train_sampling_strategy="sequential")),
    )
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    QuietStarTrainer(model, args, train_dataset=rows, processing_class=tiny.tokenizer()).train()
    assert {row["step"] for row in table(tmp_path)} == {1}
