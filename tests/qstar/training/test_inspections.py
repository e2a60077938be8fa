"""Held-out texts that are inspected while a model trains."""

from __future__ import annotations

import hashlib
import itertools
import json
import re

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from tiny_runs import texts, tiny_train, unequal_rows
from transformers import TrainerCallback

from qstar import QuietStarArguments, inspect, load
from qstar.inspection.data import Inspection
from qstar.inspection.history import history_page, snapshot
from qstar.inspection.page import page
from qstar.inspection.run import Tokens
from qstar.training.inspections import HeldOut, InspectionFolder
from qstar.training.trainer import QuietStarTrainer

SAVING = dict(save_strategy="steps", save_steps=2)
STEPS = dict(max_steps=5, inspect_steps=2, inspect_tokens=20)


def held_out() -> Dataset:
    """Of a few letters each, so that none of them is cut."""
    return Dataset.from_dict({"text": ["a b c d e", "f g h i j", "k l m", "n o p q r s", "t u v w", "a a a b"]})


def inspected(folder) -> dict[int, Inspection]:
    paths = sorted((folder / "inspections").glob("*.json"))
    return {int(path.stem.removeprefix("step-")): Inspection.from_json(path.read_text()) for path in paths}


def hashes(folder) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


def weights(folder) -> str:
    return hashes(folder)["model.safetensors"]


def test_texts_are_inspected_first_every_so_many_steps_and_last(tmp_path):
    result = tiny_train(tmp_path / "run", eval_dataset=held_out(), seq_length=24, **STEPS)
    found = inspected(result.folder)
    assert list(found) == [0, 2, 4, 5]
    assert [each.model for each in found.values()] == [f"{result.folder}, step {step}" for step in found]
    for step, each in found.items():
        assert [document.token_ids for document in each.documents] == [
            document.token_ids for document in found[0].documents
        ]
        assert sum(len(document.token_ids) for document in each.documents) <= 20
        html = (result.folder / "inspections" / f"step-{step:06}.html").read_text()
        assert html == page(each) + "\n"
    snapshots = [snapshot(step, f"step-{step:06}.html", each) for step, each in found.items()]
    index = (result.folder / "inspections" / "index.html").read_text()
    assert index == history_page(str(result.folder), found[5], snapshots) + "\n"
    assert found[0].summary.gain != found[5].summary.gain


def test_the_last_inspection_is_that_of_the_saved_model(tmp_path):
    """Number for number what ``inspect`` finds with the same settings."""
    result = tiny_train(tmp_path / "run", eval_dataset=held_out(), seq_length=24, **STEPS)
    last = inspected(result.folder)[5]
    model, tokenizer = load(result.folder)
    shown = [tokenizer.decode(document.token_ids, skip_special_tokens=True) for document in last.documents]
    assert shown == held_out()["text"][: len(shown)] and 1 < len(shown) < len(held_out())
    options = dict(seq_length=24, max_tokens=20, max_grid_tokens=4096, name=last.model)
    again = inspect(model, tokenizer, shown, **options)
    assert (again.documents, again.summary) == (last.documents, last.summary)
    assert last.settings == again.settings and last.cut


def test_inspecting_changes_nothing_that_is_learned(tmp_path):
    plain = tiny_train(tmp_path / "plain", eval_dataset=held_out(), max_steps=5, seq_length=24)
    shown = tiny_train(tmp_path / "shown", eval_dataset=held_out(), seq_length=24, **STEPS)
    assert weights(plain.folder) == weights(shown.folder)
    timed = ("runtime", "per_second")
    for name, value in plain.metrics.items():
        assert name.endswith(timed) or shown.metrics[name] == value
    assert not (plain.folder / "inspections").exists()


class Killed(BaseException):
    """As by SIGKILL: nothing catches it."""


@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_run_that_was_cut_short_leaves_what_a_whole_one_does(tmp_path, monkeypatch, at):
    """Cut after step 3, 4 or 5; the checkpoints are of 2 and 4, so that inspections of later steps come again."""
    options = dict(eval_dataset=held_out(), seq_length=24, **SAVING, **STEPS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    whole = tiny_train("run", **options)
    expected = hashes(tmp_path / "whole" / whole.folder / "inspections")

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == at:
                raise Killed

    (tmp_path / "cut").mkdir()
    monkeypatch.chdir(tmp_path / "cut")
    begin = QuietStarTrainer.__init__
    with monkeypatch.context() as patch:

        def killed_later(trainer, *args, **kwargs):
            begin(trainer, *args, **kwargs)
            trainer.add_callback(Kill)

        patch.setattr(QuietStarTrainer, "__init__", killed_later)
        with pytest.raises(Killed):
            tiny_train("run", **options)
    assert (tmp_path / "cut" / "run" / "inspections" / "step-000002.json").is_file()
    tiny_train("run", resume_from_checkpoint=True, **options)
    assert hashes(tmp_path / "cut" / "run" / "inspections") == expected


def test_other_texts_than_those_of_the_run_are_refused_when_it_goes_on(tmp_path):
    options = dict(eval_dataset=held_out(), seq_length=24, **SAVING, inspect_steps=2)
    tiny_train(tmp_path / "run", max_steps=2, inspect_tokens=40, **options)
    with pytest.raises(ValueError, match=r"step-000000.json is of other texts than those that are to be inspected now"):
        tiny_train(tmp_path / "run", max_steps=4, inspect_tokens=20, resume_from_checkpoint=True, **options)
    result = tiny_train(tmp_path / "run", max_steps=4, inspect_tokens=40, resume_from_checkpoint=True, **options)
    assert list(inspected(result.folder)) == [0, 2, 4]


def test_a_file_that_cannot_be_read_is_named_when_a_run_goes_on(tmp_path):
    options = dict(eval_dataset=held_out(), seq_length=24, **SAVING, inspect_steps=2)
    tiny_train(tmp_path / "run", max_steps=2, **options)
    broken = tmp_path / "run" / "inspections" / "step-000002.json"
    for content in (b'{"a": 1', b"\xff\xfe", b'{"schema": 0}'):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=f"{re.escape(str(broken))} cannot be read: .*; remove it, or move that"):
            tiny_train(tmp_path / "run", max_steps=4, resume_from_checkpoint=True, **options)


def test_a_run_that_goes_on_keeps_the_steps_of_its_settings_alone(tmp_path):
    options = dict(eval_dataset=held_out(), seq_length=24, **SAVING)
    tiny_train(tmp_path / "run", max_steps=3, inspect_steps=2, **options)
    assert list(inspected(tmp_path / "run")) == [0, 2, 3]
    more = tiny_train(tmp_path / "run", max_steps=6, inspect_steps=2, resume_from_checkpoint=True, **options)
    assert list(inspected(more.folder)) == [0, 2, 4, 6]


def test_a_folder_that_goes_on_has_an_index_of_what_is_there(tmp_path):
    made = tiny_train(tmp_path / "run", eval_dataset=held_out(), seq_length=24, max_steps=4, inspect_steps=2)
    found = inspected(made.folder)
    texts_inspected = [document.token_ids for document in found[0].documents]
    InspectionFolder(made.folder).begin(2, 2, texts_inspected)
    snapshots = [snapshot(step, f"step-{step:06}.html", found[step]) for step in (0, 2)]
    index = made.folder / "inspections" / "index.html"
    assert index.read_text() == history_page(str(made.folder), found[2], snapshots) + "\n"
    assert list(inspected(made.folder)) == [0, 2]
    InspectionFolder(made.folder).begin(0, 2, [[1, 2]])
    assert list(index.parent.iterdir()) == [], "a run that begins takes nothing over"


@pytest.mark.parametrize("most", [2, 5, 6, 11, 12, 100])
def test_as_many_documents_are_taken_as_have_so_many_tokens(most):
    rows = [dict(input_ids=[*range(5), *range(10, 17)], position_ids=[*range(5), *range(7)])]
    rows += [dict(input_ids=[*range(20, 26), 9], position_ids=[*range(6), 0])]
    all_of_them = [list(range(5)), list(range(10, 17)), list(range(20, 26))]  # one of a single token predicts nothing
    found = HeldOut.of(rows, most)
    lengths = list(itertools.accumulate(map(len, all_of_them)))
    whole = [each for each, end in zip(all_of_them, lengths, strict=True) if end <= most]
    assert [each.ids for each in found.documents] == (whole or [list(range(most))])
    assert [each.labels for each in found.documents] == (whole or [list(range(most))])
    assert found.cut == (most < 18)


def test_documents_in_which_nothing_is_predicted_are_left_out():
    """As questions of a chat that are longer than what is inspected: the run would not know them again."""
    ids, none = list(range(6)), [-100] * 6
    row = dict(input_ids=ids * 3, position_ids=ids * 3, labels=[*none, *none[:5], 5, 0, *none[:5]])
    assert HeldOut.of([row], 12) == HeldOut([Tokens(ids, [*none[:5], 5])], cut=False)
    with pytest.raises(ValueError, match="inspect_tokens is 4, but no text of eval_dataset has a token to predict"):
        HeldOut.of([row], 4)


@pytest.mark.parametrize("kind", [torch.tensor, np.array, list])
def test_rows_may_be_tensors_or_arrays_with_or_without_positions(kind):
    ids = [3, 4, 5]
    expected = HeldOut([Tokens(ids, ids)], cut=False)
    assert HeldOut.of([dict(input_ids=kind(ids))], 10) == expected
    found = HeldOut.of([dict(input_ids=kind(ids), position_ids=kind([1, 2, 3]))], 10)
    assert found == expected and {type(token) for token in found.documents[0].ids} == {int}


def test_what_is_not_to_be_predicted_has_no_gain(tmp_path):
    """Of a chat the answers alone, as in training and evaluation."""
    rows = unequal_rows()
    documents = HeldOut.of(rows, 12).documents
    assert documents == [Tokens(rows[0]["input_ids"], rows[0]["labels"])]
    args = QuietStarArguments(
        output_dir=str(tmp_path), max_steps=1, inspect_steps=1, inspect_tokens=24, save_strategy="no",
        report_to="none", disable_tqdm=True, sample_steps=0, per_device_eval_batch_size=2,
    )  # fmt: skip
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    trainer = QuietStarTrainer(
        model, args, train_dataset=rows[:2], eval_dataset=rows[:2], processing_class=tiny.tokenizer()
    )
    trainer.train()
    last = inspected(tmp_path)[1]
    labels = [row["labels"] for row in rows[:2]]
    for document, wanted in zip(last.documents, labels, strict=True):
        shown = [each.index + 1 for each in document.positions if each.gain is not None]
        assert shown == [place for place, label in enumerate(wanted) if place and label != -100]
    held_out = trainer.evaluate()
    assert last.summary.tokens == held_out["eval_tokens"]
    assert -last.summary.base_log_prob == pytest.approx(held_out["eval_nll_base"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(inspect_steps=2), "inspect_steps is 2, but there is no eval_dataset whose texts to inspect"),
        (dict(inspect_steps=-1), "inspect_steps is -1, but it must be an integer of at least 0"),
        (dict(inspect_steps=2, inspect_tokens=1), "inspect_tokens is 1, but it must be an integer of at least 2"),
        (dict(inspect_tokens=100), "inspect_tokens is 100, but nothing is inspected: give inspect_steps"),
    ],
)
def test_settings_that_inspect_nothing_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_trainer_without_texts_or_tokenizer_is_refused(tmp_path):
    args = QuietStarArguments(output_dir=str(tmp_path), max_steps=1, inspect_steps=3, report_to="none")
    model, rows = tiny.thinking_model("llama"), unequal_rows()
    with pytest.raises(ValueError, match="inspect_steps is 3, but eval_dataset is missing"):
        QuietStarTrainer(model, args, train_dataset=rows, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="inspect_steps is 3, but eval_dataset is empty"):
        QuietStarTrainer(model, args, train_dataset=rows, eval_dataset={}, processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match="inspect_steps is 3, but processing_class is missing"):
        QuietStarTrainer(model, args, train_dataset=rows, eval_dataset=rows)


def test_the_best_model_is_not_taken_for_the_last(tmp_path):
    """A run that ends with an earlier model has inspected the last one all the same."""
    options = dict(eval_dataset=texts(4), seq_length=24, eval_strategy="steps", eval_steps=1, **STEPS)
    best = dict(save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="gain")
    kept = tiny_train(tmp_path / "best", **options, **best, greater_is_better=False)
    last = tiny_train(tmp_path / "last", **options)
    assert inspected(kept.folder)[5].summary == inspected(last.folder)[5].summary
    state = json.loads((kept.folder / "trainer_state.json").read_text())
    assert state["best_global_step"] < 5, "else this says nothing"
