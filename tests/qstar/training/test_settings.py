"""The settings of a run: what would be ignored or make a result wrong is refused before anything is trained."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import Dataset

from qstar import Objective, train
from qstar.learning import PAPER
from qstar.training.prepare import split_settings
from qstar.training.settings import IGNORED_ARGUMENTS, OF_PRESET, PRESETS, QuietStarArguments
from qstar.training.trainer import IGNORED_HOOKS, QuietStarTrainer

GIVEN = dict(
    label_smoothing_factor=0.1,
    prediction_loss_only=True,
    include_for_metrics=["inputs"],
    batch_eval_metrics=True,
    eval_accumulation_steps=2,
    eval_use_gather_object=True,
    eval_do_concat_batches=False,
    label_names=["labels"],
    fp16_full_eval=True,
    bf16_full_eval=True,
    neftune_noise_alpha=5.0,
    torch_compile=True,
)


@pytest.mark.parametrize("name", GIVEN)
def test_an_argument_that_would_be_ignored_is_refused(name, tmp_path):
    with pytest.raises(ValueError) as caught:
        QuietStarArguments(str(tmp_path), use_cpu=True, report_to="none", **{name: GIVEN[name]})
    assert str(caught.value).startswith(f"{name} is {GIVEN[name]!r}, but it must be left alone: ")
    assert IGNORED_ARGUMENTS[name] in str(caught.value)


def test_every_refused_argument_is_tried_above_but_for_what_needs_a_library():
    assert set(IGNORED_ARGUMENTS) - set(GIVEN) == {"use_liger_kernel"}


def test_the_refusal_comes_before_the_run(tmp_path):
    data = Dataset.from_dict({"text": ["a b c d"] * 4})
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1"):
        train(tiny.plain_model("llama"), data, output_dir=tmp_path / "run", label_smoothing_factor=0.1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", IGNORED_HOOKS)
def test_a_hook_that_would_be_ignored_is_refused(name, tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    args = QuietStarArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=f"{name} is given, but it would be ignored"):
        QuietStarTrainer(model, args, **{name: lambda *_: {}})


def test_settings_are_told_apart():
    thoughts, training = split_settings(
        "train()", dict(thought_tokens=3, sigmoid=True, learning_rate=1e-3, batch_size=2)
    )
    assert thoughts == dict(thought_tokens=3, sigmoid=True)
    assert training == dict(learning_rate=1e-3, per_device_train_batch_size=2)
    unset = split_settings("train()", dict(thought_tokens=None, rationales=None, batch_size=None, start_init=None))
    assert unset == (dict(start_init=None), {})


def test_two_names_of_one_setting_are_refused():
    with pytest.raises(ValueError, match="batch_size is another name for per_device_train_batch_size, but both"):
        split_settings("train()", dict(batch_size=2, per_device_train_batch_size=4))


def test_a_model_that_thinks_keeps_what_it_was_made_with(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    data = Dataset.from_dict({"text": ["a b c d e f"] * 4})
    options = dict(
        tokenizer=tiny.tokenizer(), max_steps=1, batch_size=2, seq_length=6, report_to="none", save_strategy="no"
    )
    for name, value, made_with in (("start_init", "a", "---"), ("sigmoid", True, False), ("end_token", "<e>", None)):
        made_with = model.qstar.end_token if made_with is None else made_with
        with pytest.raises(ValueError, match=rf"{name} is {value!r}, but the model was made with") as caught:
            train(model, data, output_dir=tmp_path / "other", **options, **{name: value})
        assert repr(made_with) in str(caught.value)
    trained = train(model, data, output_dir=tmp_path / "run", **options, thought_tokens=4, sigmoid=False).model
    assert (trained.qstar.thought_tokens, trained.qstar.sigmoid) == (4, False)


def test_the_objective_is_what_the_settings_say(tmp_path):
    args = QuietStarArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        policy_weight=0.5,
        likelihood_weight=0.3,
        entropy_weight=0.02,
        thought_temperature=0.7,
        reinforce_temperature=2.0,
        baseline="base",
        signed_advantages=False,
    )
    objective = args.objective()
    values = (objective.policy_weight, objective.temperature, objective.reinforce_temperature)
    assert values == (0.5, 0.7, 2.0)
    assert (objective.likelihood_weight, objective.entropy_weight) == (0.3, 0.02)
    assert (objective.baseline, objective.signed) == ("base", False)
    assert args.folder == tmp_path


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(), ("leave_one_out", True, 1.0, 1.0)),
        (dict(preset="paper"), ("mean", False, 3.0, 1.0)),
        (dict(preset="rlp"), ("leave_one_out", True, 1.0, 1.0)),
        (dict(preset="rlp", likelihood_weight=0.0), ("leave_one_out", True, 1.0, 0.0)),
        (dict(preset="rlp", signed_advantages=False, baseline="base"), ("base", False, 1.0, 1.0)),
        (dict(reinforce_temperature=2.0), ("leave_one_out", True, 2.0, 1.0)),
        (dict(thought_temperature=0.7), ("leave_one_out", True, 0.7, 1.0)),
        (dict(thought_temperature=0.7, reinforce_temperature=1.0), ("leave_one_out", True, 1.0, 1.0)),
        (dict(thought_temperature=0.0), ("leave_one_out", True, 1.0, 1.0)),
        (dict(thought_temperature=0.7, preset="paper"), ("mean", False, 3.0, 1.0)),
        (dict(preset="paper", reinforce_temperature=1.0), ("mean", False, 1.0, 1.0)),
    ],
)
def test_a_preset_gives_what_is_not_given(settings, expected, tmp_path):
    args = QuietStarArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    objective = args.objective()
    values = (objective.baseline, objective.signed, objective.reinforce_temperature, objective.likelihood_weight)
    assert values == expected
    shown = args.to_dict()
    assert tuple(shown[name] for name in OF_PRESET) == (expected[3], expected[0], expected[1], expected[2])


def test_defaults_and_the_papers_rule_are_those_of_the_objective(tmp_path):
    common = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_grid_tokens=0)
    assert QuietStarArguments(**common).objective() == QuietStarArguments(**common, preset="rlp").objective()
    assert QuietStarArguments(**common).objective() == Objective()
    assert QuietStarArguments(**common, preset="paper").objective() == Objective(**PAPER)
    assert all(preset.keys() == set(OF_PRESET) for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(preset="RLP"), "preset is 'RLP', but it must be one of paper, rlp"),
        (dict(preset=None), "preset is None, but it must be one of paper, rlp"),
        (dict(signed_advantages="no"), "signed_advantages is 'no', but it must be True, False or None"),
        (dict(likelihood_weight="0"), "likelihood_weight is '0', but it must be a number"),
        (dict(baseline="none"), "baseline is 'none', but it must be one of mean, leave_one_out, base"),
    ],
)
def test_a_wrong_setting_of_the_objective_is_named(settings, message, tmp_path):
    with pytest.raises(ValueError) as refused:
        QuietStarArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("eval_nll_talk", False),
        ("nll_base", False),
        ("eval_perplexity_talk", False),
        ("eval_loss", False),
        ("eval_wiki_nll_talk", False),
        ("eval_gain", True),
    ],
)
def test_the_best_model_is_the_one_with_the_better_metric(metric, expected, tmp_path):
    options = dict(use_cpu=True, report_to="none", metric_for_best_model=metric)
    assert QuietStarArguments(str(tmp_path), **options).greater_is_better is expected
    assert (
        QuietStarArguments(str(tmp_path), **options, greater_is_better=not expected).greater_is_better is not expected
    )


def test_a_metric_without_a_direction_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="metric_for_best_model is 'eval_mixing_weight', but it must end in loss, nll_base"
    ):
        QuietStarArguments(str(tmp_path), metric_for_best_model="eval_mixing_weight", use_cpu=True, report_to="none")
    QuietStarArguments(
        str(tmp_path), metric_for_best_model="mixing_weight", greater_is_better=True, use_cpu=True, report_to="none"
    )


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("gradient_accumulation_steps", 0, 1),
        ("per_device_train_batch_size", "4", 1),
        ("per_device_eval_batch_size", 0, 1),
        ("seq_length", 1, 2),
        ("sample_steps", -1, 0),
        ("gradient_norm_steps", 2.5, 0),
        ("seed", True, 0),
    ],
)
def test_a_number_that_is_none_or_too_small_is_named(name, value, least, tmp_path):
    with pytest.raises(ValueError) as refused:
        QuietStarArguments(str(tmp_path), report_to="none", **{name: value})
    assert str(refused.value) == f"{name} is {value!r}, but it must be an integer of at least {least}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "1e-3"), ("policy_weight", "1"), ("max_grad_norm", None), ("num_train_epochs", True)],
)
def test_what_is_no_number_is_named(name, value, tmp_path):
    with pytest.raises(ValueError) as refused:
        QuietStarArguments(str(tmp_path), report_to="none", **{name: value})
    assert str(refused.value) == f"{name} is {value!r}, but it must be a number"


@pytest.mark.parametrize("value", [0, "3", 2.0])
def test_steps_that_are_no_number_of_steps_are_named(value, tmp_path):
    with pytest.raises(
        ValueError, match=f"max_steps is {value!r}, but it must be an integer: the steps to train for, or -1"
    ):
        QuietStarArguments(str(tmp_path), report_to="none", max_steps=value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_trains_on_its_cpu(tmp_path):
    args = QuietStarArguments(str(tmp_path), report_to="none", bf16=True)
    assert args.device.type == "cpu" and args.use_cpu and args.bf16
    with pytest.raises(ValueError, match="fp16 is True, but there is no GPU: a CPU trains in bfloat16"):
        QuietStarArguments(str(tmp_path), report_to="none", fp16=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(documents="line"), "documents is 'line', but only a .txt file is cut into documents by it"),
        (dict(eval_split="validation"), "eval_split is 'validation', but there is no eval_dataset that it could be of"),
        (dict(eval_config="main"), "eval_config is 'main', but there is no eval_dataset that it could be of"),
    ],
)
def test_a_setting_of_data_that_would_be_ignored_is_refused(settings, message, tmp_path):
    data = Dataset.from_dict({"text": ["a b c d"] * 4})
    with pytest.raises(ValueError) as refused:
        train(tiny.plain_model("llama"), data, output_dir=tmp_path / "run", report_to="none", **settings)
    assert str(refused.value) == message
