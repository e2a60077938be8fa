"""What the trackers of transformers are told of a run: each metric once, under one name."""

from __future__ import annotations

from collections import Counter

import pytest
from tiny_runs import records, texts, tiny_train
from transformers import TrainerCallback
from transformers.integrations.integration_utils import is_tensorboard_available, rewrite_logs

from qstar.training.thought_statistics import COLLAPSED
from qstar.training.trainer import LOGGED, QuietStarTrainer

OPTIONS = dict(max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=3, on_nonfinite="skip", sample_steps=2)
OF_THE_RUN = {"train/train_runtime", "train/train_steps_per_second", "train/train_loss"}


def trained(folder, callback=None, **changes):
    """A run that is evaluated as well, and what ``callback`` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        if callback is not None:
            begin = QuietStarTrainer.__init__

            def with_callback(trainer, *args, **kwargs):
                begin(trainer, *args, **kwargs)
                trainer.add_callback(callback)

            patch.setattr(QuietStarTrainer, "__init__", with_callback)
        return tiny_train(folder, eval_dataset=texts(4), gradient_norm_steps=2, **OPTIONS, **changes)


class Tracker(TrainerCallback):
    """Keeps what a tracker is given, by transformers' names for it: (step, name) and value."""

    def __init__(self) -> None:
        self.values: list[tuple[tuple[int, str], object]] = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.values += [((state.global_step, name), value) for name, value in rewrite_logs(logs).items()]


def test_a_tracker_is_given_each_metric_once_a_step_as_a_number(tmp_path):
    tracker = Tracker()
    result = trained(tmp_path, tracker)
    times = Counter(place for place, _ in tracker.values)
    ended = {(3, "train/epoch"), (3, "eval/epoch")}  # with the last step, an evaluation and the end of the run
    assert {place for place, count in times.items() if count > 1} <= ended
    assert all(type(value) in (int, float) for _, value in tracker.values)
    names = {name for _, name in times}
    assert {
        f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "skipped_updates", *LOGGED, *COLLAPSED)
    } <= names
    assert {f"eval/{name}" for name in ("loss", "nll_base", "nll_talk", "gain", "tokens", "perplexity_talk")} <= names
    assert {"train/likelihood_gradient_norm", "train/policy_gradient_norm"} <= names

    told = dict(tracker.values)
    for record in records(result.folder):
        for name, value in record.items():
            if name not in ("step", "thoughts", "epoch"):
                prefix, bare = ("eval", name[5:]) if name.startswith("eval_") else ("train", name)
                assert told[record["step"], f"{prefix}/{bare}"] == value, name
    assert names >= OF_THE_RUN


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard is not installed")
def test_tensorboard_has_the_values_of_the_log(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = trained(tmp_path, report_to="tensorboard")
    [file] = result.folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    logged = records(result.folder)
    tags = events.Tags()["scalars"]
    assert len(set(tags)) == len(tags)
    for name in ("loss", *LOGGED, *COLLAPSED, "eval_nll_talk", "eval_gain"):
        tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
        found = {event.step: event.value for event in events.Scalars(tag)}
        wanted = {record["step"]: record[name] for record in logged if name in record}
        assert found == pytest.approx(wanted, rel=1e-6) and found, name
