"""A curriculum: which stage an update is made in, at which rate, and that a run which is cut short goes on in it."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from tiny_runs import QUIET, records, texts, tiny_train, unequal_rows

from qstar import load
from qstar.commands.main import main
from qstar.config import CONFIG_FILE
from qstar.training.saving import SETTINGS_FILE
from qstar.training.settings import QuietStarArguments
from qstar.training.stages import Curriculum, Stage, read_stages
from qstar.training.trainer import QuietStarTrainer

STAGES = [
    dict(steps=2, thought_tokens=3, ahead_tokens=2),
    dict(steps=1, thought_tokens=2, learning_rate=4e-3, rationales=3),
    dict(steps=3, ahead_tokens=1),
]
SIZES = [(3, 2, 2)] * 2 + [(2, 2, 3)] + [(2, 1, 3)] * 3  # K, m and r of every update


def staged(folder, **settings):
    """A run in the three stages."""
    return tiny_train(folder, **(dict(stages=STAGES, max_steps=-1, logging_steps=1) | settings))


@pytest.fixture
def updates(monkeypatch):
    """Of every batch that was computed: the update, the shape of a thought at it, and the rate of the base model."""
    taken, compute = [], QuietStarTrainer.compute_loss

    def watched(trainer, *args, **kwargs):
        loss, output = compute(trainer, *args, **(kwargs | dict(return_outputs=True)))
        rationales, tokens = output.thoughts.shape[2:]
        sizes = (tokens, trainer.thinking_model.qstar.ahead_tokens, rationales)
        taken.append((trainer.state.global_step, sizes, trainer.optimizer.param_groups[0]["lr"]))
        return loss

    monkeypatch.setattr(QuietStarTrainer, "compute_loss", watched)
    return taken


def test_every_update_is_made_in_its_stage_at_its_rate(tmp_path, updates):
    """The linear schedule falls over the steps of each stage; a stage keeps what it does not change."""
    result = staged(tmp_path, learning_rate=1e-3, gradient_accumulation_steps=2)
    assert [step for step, _, _ in updates] == [step for step in range(6) for _ in range(2)]
    assert [sizes for _, sizes, _ in updates[::2]] == SIZES
    rates = [1e-3, 1e-3 / 2, 4e-3, 4e-3, 4e-3 * 2 / 3, 4e-3 / 3]
    assert [rate for _, _, rate in updates[::2]] == pytest.approx(rates, rel=1e-12)
    assert [record["stage"] for record in records(tmp_path) if "loss" in record] == [1, 1, 2, 3, 3, 3]
    kept = (result.model.qstar.thought_tokens, result.model.qstar.ahead_tokens, result.model.qstar.rationales)
    assert kept == SIZES[-1] and load(tmp_path)[0].qstar == result.model.qstar
    stored = json.loads((tmp_path / SETTINGS_FILE).read_text())["stages"]
    assert read_stages(stored).resolved() == read_stages(stored)
    assert [(s["thought_tokens"], s["ahead_tokens"], s["rationales"]) for s in stored] == [SIZES[i] for i in (0, 2, 3)]
    assert [s["learning_rate"] for s in stored] == [1e-3, 4e-3, 4e-3]


def test_one_stage_is_the_run_without_stages_bit_for_bit(tmp_path):
    options = dict(warmup_steps=1, lr_scheduler_type="cosine", logging_steps=1)
    plain = tiny_train(tmp_path / "plain", max_steps=3, **options)
    staged = tiny_train(tmp_path / "staged", max_steps=-1, stages=[dict(steps=3)], **options)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(staged.model.state_dict()[name], tensor), name
    for ours, theirs in zip(records(staged.folder), records(plain.folder), strict=True):
        for name in theirs.keys() - {"train_runtime", "train_samples_per_second", "train_steps_per_second"}:
            assert ours[name] == theirs[name], name


def test_a_later_stage_begins_with_all_that_the_earlier_has_learned(tmp_path):
    """Seen at a rate that changes no weight: mixing head and thought embeddings are those of the first stage."""
    options = dict(max_steps=-1, optim="sgd", lr_scheduler_type="constant")
    first = tiny_train(tmp_path / "first", stages=[dict(steps=2)], **options).model.state_dict()
    then = dict(steps=2, thought_tokens=5, learning_rate=1e-30)
    both = tiny_train(tmp_path / "both", stages=[dict(steps=2), then], **options).model
    assert both.qstar.thought_tokens == 5 and first["qstar_mixing_head.output.weight"].any()
    for name, tensor in both.state_dict().items():
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("step", range(1, 6))
def test_a_run_that_is_cut_short_in_any_stage_goes_on_as_if_it_had_not_been(step, tmp_path, updates):
    options = dict(save_strategy="steps", save_steps=1)
    whole = staged(tmp_path / "whole", **options)
    staged(tmp_path / "cut", **options)
    updates.clear()
    resumed = staged(tmp_path / "cut", resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"), **options)
    assert [each for each, _, _ in updates] == list(range(step, 6))
    assert [sizes for _, sizes, _ in updates] == SIZES[step:]
    assert resumed.model.qstar == whole.model.qstar
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    assert (
        json.loads((tmp_path / "cut" / f"checkpoint-{step}" / CONFIG_FILE).read_text())["thought_tokens"]
        == (SIZES[step - 1][0])
    )


def test_a_finished_run_is_taken_up_with_the_sizes_of_its_last_stage(tmp_path, updates):
    whole = staged(tmp_path, save_strategy="steps", save_steps=3)
    updates.clear()
    again = staged(tmp_path, save_strategy="steps", save_steps=3, resume_from_checkpoint=True)
    assert updates == [] and again.model.qstar == whole.model.qstar


def test_a_last_stage_distils_and_leaves_what_makes_the_thoughts_as_it_is(tmp_path):
    """Also the momentum of an optimizer that has moved it before; the log says how far the predictions differ."""
    options = dict(max_steps=-1, logging_steps=1, gradient_norm_steps=1, learning_rate=1e-3, warmup_steps=0)
    first = tiny_train(tmp_path / "first", stages=[dict(steps=4)], **options).model
    stages = [dict(steps=4), dict(steps=3, distil=True)]
    result = tiny_train(tmp_path / "both", stages=stages, save_strategy="steps", save_steps=5, **options)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]) is name.startswith("qstar_"), name
    logged = [record for record in records(result.folder) if "loss" in record]
    assert [record["stage"] for record in logged] == [1] * 4 + [2] * 3
    for record in logged[:4]:
        assert "divergence" not in record and "likelihood_gradient_norm" in record
    for record in logged[4:]:
        assert record["divergence"] + record["nll_base"] == pytest.approx(record["loss"]) and record["divergence"] > 0
        assert not {"policy_loss", "reward", "likelihood_gradient_norm"} & record.keys()
        assert {"nll_base", "nll_talk", "mixing_weight", "thought_entropy", "distinct_thoughts"} <= record.keys()
    checkpoint = str(result.folder / "checkpoint-5")
    again = tiny_train(
        result.folder, stages=stages, save_strategy="steps", save_steps=5, resume_from_checkpoint=checkpoint, **options
    )
    assert all(torch.equal(again.model.state_dict()[name], x) for name, x in result.model.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_update_that_distils_is_the_same_however_it_is_split_into_batches(batch_size, tmp_path):
    results = []
    for size in (4, batch_size):
        model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
        options = QUIET | dict(logging_steps=1, max_grad_norm=1e9, optim="sgd", learning_rate=0.1, warmup_steps=0)
        args = QuietStarArguments(
            str(tmp_path / str(size)),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            train_sampling_strategy="sequential",
            stages=[dict(steps=2, distil=True)],
            **options,
        )
        QuietStarTrainer(model, args, train_dataset=unequal_rows()).train()
        results.append((model.state_dict(), [r for r in records(args.folder) if "loss" in r]))
    (whole, whole_log), (split, split_log) = results
    start = tiny.thinking_model(thought_tokens=2, ahead_tokens=2).state_dict()
    for name, weight in whole.items():
        moved = (weight - start[name]).norm()
        assert (split[name] - weight).norm() <= 1e-4 * moved, name
        assert (moved > 0) is not name.startswith("qstar_"), name
    for ours, theirs in zip(split_log, whole_log, strict=True):
        for name in ("loss", "divergence", "nll_base", "nll_talk", "mixing_weight"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_there_is_nothing_to_distil_before_the_mixing_head_has_learned(tmp_path):
    with pytest.raises(ValueError, match="stage 1 distils, but the mixing head starts at zero"):
        tiny_train(tmp_path / "run", max_steps=-1, stages=[dict(steps=1, distil=True)])


def test_an_update_of_a_stage_is_found_by_its_number():
    curriculum = Curriculum((Stage(steps=2), Stage(steps=1), Stage(steps=3)))
    assert curriculum.steps == 6
    assert [curriculum.find(step) for step in range(8)] == [(0, 0)] * 2 + [(1, 2)] + [(2, 3)] * 5


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is [], but it must be a list with the settings of each stage, at least one"),
        ({"steps": 3}, "stages is {'steps': 3}, but it must be a list with the settings of each stage, at least one"),
        ([3], "stage 1 is 3, but it must be settings with their values, steps at least"),
        ([dict(steps=1), dict(thought_tokens=2)], "stage 2: steps is missing, the updates in it"),
        ([dict(steps=0)], "stage 1: steps is 0, but it must be an integer of at least 1"),
        ([dict(steps=2.0)], "stage 1: steps is 2.0, but it must be an integer of at least 1"),
        ([dict(steps=1, thought_tokens=0)], "stage 1: thought_tokens is 0, but it must be an integer of at least 1"),
        ([dict(steps=1, rationales=True)], "stage 1: rationales is True, but it must be an integer of at least 1"),
        ([dict(steps=1, distil=1)], "stage 1: distil is 1, but it must be True or False"),
        ([dict(steps=1, learning_rate="1e-3")], "stage 1: learning_rate is '1e-3', but it must be a number above 0"),
        ([dict(steps=1, learning_rate=0)], "stage 1: learning_rate is 0, but it must be a number above 0"),
    ],
)
def test_what_is_no_stage_is_named(stages, message):
    with pytest.raises(ValueError) as refused:
        read_stages(stages)
    assert str(refused.value) == message


def test_a_setting_that_a_stage_does_not_have_is_named():
    with pytest.raises(TypeError, match="stage 2 has no setting 'thought_token'; did you mean 'thought_tokens'"):
        read_stages([dict(steps=1), dict(steps=1, thought_token=3)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_steps=5), "max_steps is 5, but the stages have 6 steps: leave it out"),
        (dict(num_train_epochs=2.0), r"num_train_epochs is 2\.0, but the stages say how long: leave it out"),
        (dict(learning_rate=0.0), "learning_rate is 0, but with stages it must be above 0"),
        (dict(stages="["), "must be JSON or the name of a .json file: Expecting value in line 1"),
    ],
)
def test_what_does_not_go_with_stages_is_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        QuietStarArguments(str(tmp_path), use_cpu=True, report_to="none", **(dict(stages=STAGES) | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(stages=[dict(steps=1), dict(steps=1, thought_tokens=120)]), "max_position_embeddings = 128"),
        (
            dict(lr_scheduler_type="reduce_lr_on_plateau"),
            "lr_scheduler_type is 'reduce_lr_on_plateau', but with stages",
        ),
    ],
)
def test_what_a_later_stage_could_not_do_is_refused_before_the_first(settings, message, tmp_path, updates):
    with pytest.raises(ValueError, match=message):
        staged(tmp_path / "run", eval_strategy="steps", eval_dataset=texts(4), **settings)
    assert updates == []


@pytest.mark.parametrize("given", ["text", "file"])
def test_stages_are_given_as_json_or_in_a_file_of_it(given, tmp_path):
    text = json.dumps(STAGES)
    (tmp_path / "stages.json").write_text(text)
    value = text if given == "text" else str(tmp_path / "stages.json")
    args = QuietStarArguments(str(tmp_path), stages=value, **QUIET)
    assert args.stages == STAGES and args.max_steps == 6
    with pytest.raises(FileNotFoundError, match=r"stages is 'none\.json', but there is no such file"):
        QuietStarArguments(str(tmp_path), stages="none.json", **QUIET)


def test_a_file_of_settings_and_a_flag_give_stages(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("stages:\n- {steps: 2, thought_tokens: 3}\n- {steps: 1, learning_rate: 4e-3}\n")
    assert main(["train", "--config", str(path), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert printed == 'stages: [{"steps": 2, "thought_tokens": 3}, {"steps": 1, "learning_rate": 0.004}]\n'
    path.write_text(printed)
    assert main(["train", "--config", str(path), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["train", "--stages", '[{"steps": 0}]', "--print-config"]) == 1
    assert "stage 1: steps is 0" in capsys.readouterr().err


def test_stages_change_what_a_trainer_of_ones_own_takes(tmp_path):
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=2)
    rows = [{"input_ids": tiny.text(1, 12, seed)[0].tolist(), "position_ids": list(range(12))} for seed in range(4)]
    args = QuietStarArguments(str(tmp_path), stages=[dict(steps=1), dict(steps=1, thought_tokens=2)], **QUIET)
    QuietStarTrainer(model, args, train_dataset=rows).train()
    assert model.qstar.thought_tokens == 2


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([dict(), dict(thought_tokens=9), dict(thought_tokens=2)], 1),
        ([dict(), dict(rationales=3, thought_tokens=1)], 0),  # 2 * 6 tokens and 3 * 3
        ([dict(), dict(rationales=4, thought_tokens=1)], 0),  # as many: the first
        ([dict(), dict(ahead_tokens=3), dict(distil=True, thought_tokens=99)], 1),
        ([dict(distil=True), dict()], 1),
        ([dict(distil=True), dict(distil=True, ahead_tokens=2)], 1),
    ],
)
def test_the_stage_that_takes_most_is_found(stages, expected):
    first = dict(thought_tokens=4, ahead_tokens=1, rationales=2, learning_rate=1e-3)
    assert read_stages([dict(steps=1) | stage for stage in stages]).resolved(**first).largest() == expected
