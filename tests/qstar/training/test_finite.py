"""A loss or a gradient that is not finite: it is named, it never reaches the weights, and the run stops or goes on."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from tiny_runs import QUIET, records, unequal_rows
from transformers import Trainer
from wait_watch import WaitWatch

from qstar.learning import Objective
from qstar.training.finite import MOST_SKIPPED, not_finite
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

NAN, INF = float("nan"), float("inf")
HEAD = "qstar_mixing_head.output.weight"


def spoiled_in(*batches: int, what: str = "loss", value: float = NAN) -> type[QuietStarTrainer]:
    """A Trainer that finds a part of the loss, the loss or the gradient of a weight spoiled in some of its batches."""

    class Spoiled(QuietStarTrainer):
        seen = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.seen += 1
            if self.seen - 1 not in batches:
                return super().compute_loss(model, inputs, return_outputs)
            if what in ("nll_talk", "policy_loss", "mixing_weight"):

                class Objecting(Objective):
                    def __call__(self, *args, **kwargs):
                        output = super().__call__(*args, **kwargs)
                        output[what] = output[what] * value
                        output.loss = output.loss * (1 if what == "mixing_weight" else value)
                        return output

                self.objective = Objecting()
                loss = super().compute_loss(model, inputs)
                self.objective = Objective()
                return loss
            loss = super().compute_loss(model, inputs)
            if what == "loss":
                return loss * value
            hook = model.get_parameter(what).register_hook(lambda gradient: (hook.remove(), gradient * value)[1])
            return loss

    return Spoiled


def trained(kind, folder, model=None, **changes):
    """A model that is trained on rows of unequal weight, one in a batch, and its Trainer."""
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2) if model is None else model
    options = QUIET | dict(
        max_steps=4, warmup_steps=0, learning_rate=1e-2, logging_steps=1, lr_scheduler_type="constant"
    )
    options |= dict(per_device_train_batch_size=1, train_sampling_strategy="sequential")
    args = QuietStarArguments(str(folder), **(options | changes))
    trainer = kind(model, args, train_dataset=unequal_rows(), processing_class=tiny.tokenizer())
    trainer.train()
    return model, trainer


@pytest.mark.parametrize(
    ("what", "named", "advice"),
    [
        ("loss", "the loss is not finite in step 3:", "a lower learning_rate or more warmup_steps"),
        ("nll_talk", "nll_talk is not finite in step 3, one of", "sigmoid=True"),
        ("mixing_weight", "mixing_weight is not finite in step 3:", "sigmoid=True"),
        ("policy_loss", "policy_loss is not finite in step 3, one of", "a lower policy_weight"),
        (HEAD, f"the gradient of {HEAD} is not finite in step 3:", "a lower mixing_head_lr_factor"),
        ("model.layers.1.mlp.up_proj.weight", "the gradient of model.layers.1.mlp.up_proj.weight is", "learning_rate"),
    ],
)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_error_names_what_is_not_finite_in_any_batch_of_the_update(
    what, named, advice, value, accumulation, tmp_path
):
    """Though the batch is the first of two, and the weights are those of two updates."""
    before, _ = trained(QuietStarTrainer, tmp_path / "a", max_steps=2, gradient_accumulation_steps=accumulation)
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    kind = spoiled_in(2 * accumulation, what=what, value=value)
    with pytest.raises(FloatingPointError) as stopped:
        trained(kind, tmp_path / "b", model, gradient_accumulation_steps=accumulation)
    said = str(stopped.value)
    if what == "loss":
        assert "the loss is not finite in step 3" in said
    else:
        assert said.startswith(named)
    assert advice in said and "on_nonfinite='skip'" in said
    for name, weight in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("weight", ["model.layers.1.mlp.up_proj.weight", HEAD])
def test_a_model_that_was_not_finite_before_is_told_from_a_step_that_went_wrong(weight, policy, tmp_path):
    """Where logits are NaN, no thought can be sampled; where it is the mixing head that is, one can."""
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with torch.no_grad():
        model.get_parameter(weight)[0, 4] = NAN
    with pytest.raises(FloatingPointError, match=rf"the weight {weight} is not finite in step \d+, ") as stopped:
        trained(QuietStarTrainer, tmp_path, model, on_nonfinite=policy, max_steps=20)
    assert "load the model again" in str(stopped.value)


def test_states_that_are_not_finite_though_weights_are_are_named(tmp_path):
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * INF)
    with pytest.raises(FloatingPointError, match="nll_base is not finite in step 1, so that no thought can be sampled"):
        trained(QuietStarTrainer, tmp_path, model)


def test_an_error_of_another_kind_stays_what_it_is(tmp_path):
    """Though a weight is not finite as well."""
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    model.config.max_position_embeddings = 13
    with torch.no_grad():
        model.get_parameter(HEAD)[0, 4] = NAN
    with pytest.raises(ValueError, match="make more than the model's max_position_embeddings = 13"):
        trained(QuietStarTrainer, tmp_path, model)


@pytest.mark.parametrize("what", ["loss", HEAD])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_skipped_update_leaves_no_trace_in_weights_optimizer_or_log(what, optim, max_grad_norm, tmp_path):
    """The run is that of the other rows: the third is passed over, and so are its thoughts."""
    options = dict(optim=optim, max_grad_norm=max_grad_norm, weight_decay=0.1)
    model, trainer = trained(spoiled_in(2, what=what), tmp_path / "a", on_nonfinite="skip", **options)
    whole = records(tmp_path / "a")

    class Passing(QuietStarTrainer):
        """Takes the rows but the third, with the seeds that they had."""

        def _objective_for(self, input_ids):
            objective = super()._objective_for(input_ids)
            step = self.state.global_step + (self.state.global_step > 1)
            objective.seed = (self.args.seed << 32) + step
            return objective

    rows = unequal_rows()
    expected = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    quiet = QUIET | dict(max_steps=3, warmup_steps=0, learning_rate=1e-2, logging_steps=1, lr_scheduler_type="constant")
    quiet |= dict(per_device_train_batch_size=1, train_sampling_strategy="sequential")
    args = QuietStarArguments(str(tmp_path / "b"), **quiet, **options)
    other = Passing(expected, args, train_dataset=[*rows[:2], *rows[3:]], processing_class=tiny.tokenizer())
    other.train()
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert trainer.optimizer.state_dict()["state"].keys() == other.optimizer.state_dict()["state"].keys()
    logged, wanted = ([r for r in found if "loss" in r] for found in (whole, records(tmp_path / "b")))
    assert [r["step"] for r in logged] == [1, 2, 4]
    assert [r["skipped_updates"] for r in logged] == [0, 0, 1]
    for ours, theirs in zip(logged, wanted, strict=True):
        assert {k: v for k, v in theirs.items() if k not in ("step", "epoch")}.items() <= ours.items()


def test_the_mean_in_the_log_is_over_the_updates_that_were_made(tmp_path):
    _, trainer = trained(spoiled_in(0, 5), tmp_path / "a", on_nonfinite="skip", max_steps=6, logging_steps=3)
    trained(spoiled_in(0, 5), tmp_path / "b", on_nonfinite="skip", max_steps=6, logging_steps=1)
    (first, last), single = ([r for r in records(tmp_path / name) if "loss" in r] for name in "ab")
    assert [r["step"] for r in single] == [2, 3, 4, 5]
    for name in ("loss", "nll_talk", "reward"):
        assert first[name] == pytest.approx((single[0][name] + single[1][name]) / 2, rel=1e-6, abs=1e-9)
        assert last[name] == pytest.approx((single[2][name] + single[3][name]) / 2, rel=1e-6, abs=1e-9)
    assert (first["skipped_updates"], last["skipped_updates"]) == (1, 2)
    assert "grad_norm" not in last and "grad_norm" in first
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])


def test_a_run_that_would_be_skipped_for_ever_stops(tmp_path):
    start = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    with pytest.raises(
        FloatingPointError, match=rf"in step {MOST_SKIPPED + 1}, .*, and the {MOST_SKIPPED} steps before it"
    ):
        trained(spoiled_in(*range(40)), tmp_path, model, on_nonfinite="skip", max_steps=40)
    for name, weight in start.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_policy_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite is 'ignore', but it must be one of stop, skip"):
        QuietStarArguments(str(tmp_path), on_nonfinite="ignore", **QUIET)


def test_with_deepspeed_an_update_cannot_be_skipped(tmp_path, monkeypatch):
    begin = Trainer.__init__

    def sharded(trainer, *args, **kwargs):
        begin(trainer, *args, **kwargs)
        trainer.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "__init__", sharded)
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    QuietStarTrainer(model, QuietStarArguments(str(tmp_path), **QUIET))
    with pytest.raises(ValueError, match="on_nonfinite is 'skip', but with DeepSpeed it must be 'stop'"):
        QuietStarTrainer(model, QuietStarArguments(str(tmp_path), on_nonfinite="skip", **QUIET))


def test_a_norm_beyond_a_float_is_no_gradient_that_is_not_finite():
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight.grad = torch.full((4, 4), 3e38)
    assert torch.nn.utils.get_total_norm([model.weight.grad]).isinf()
    assert not_finite({"loss": torch.tensor(1.0)}, model) == []
    model.weight.grad[1, 2] = INF
    assert not_finite({"loss": torch.tensor(1.0)}, model) == ["the gradient of weight"]


def test_the_host_asks_once_whether_an_update_is_finite():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=2)
    output = model(tiny.text(1, 8), objective=Objective(seed=1))
    output.loss.backward()
    with WaitWatch() as watch:
        assert not_finite({name: output[name] for name in ("loss", "nll_talk", "policy_loss")}, model) == []
    assert watch.waits == ["__bool__"]
