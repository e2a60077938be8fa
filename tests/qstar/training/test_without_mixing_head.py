"""Training without a mixing head: the state after the thought predicts alone, and there is nothing to mix by."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from tiny_runs import QUIET, records, texts, tiny_train

from qstar import evaluate, inspect, load, reference
from qstar.config import CONFIG_FILE
from qstar.model import MIXING_HEAD_FILE
from qstar.training.card import CARD_FILE
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

WITHOUT = dict(mixing_head=False, likelihood_weight=0.0, signed_advantages=True, baseline="leave_one_out")


def test_a_run_learns_from_the_reward_alone_and_goes_on_from_a_checkpoint(tmp_path):
    """Its folder has no mixing head, and what is loaded evaluates as what was trained."""
    options = WITHOUT | dict(max_steps=4, save_strategy="steps", save_steps=2, logging_steps=1)
    whole = tiny_train(tmp_path / "whole", eval_dataset=texts(4), **options)
    cut = tmp_path / "cut"
    tiny_train(cut, **options)
    resumed = tiny_train(cut, resume_from_checkpoint=str(cut / "checkpoint-2"), **options).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.model.state_dict().items())
    assert not any("mixing_head" in name for name in resumed)
    logged = [record for record in records(whole.folder) if "reward" in record]
    assert all(record["mixing_weight"] == 1 and record["policy_loss"] != 0 for record in logged)
    assert not (whole.folder / MIXING_HEAD_FILE).exists()
    assert json.loads((whole.folder / CONFIG_FILE).read_text())["mixing_head"] is False
    model, tokenizer = load(whole.folder)
    found = evaluate(model, tokenizer, texts(4), seq_length=12)
    assert found.nll_talk == pytest.approx(whole.metrics["eval_nll_talk"], rel=1e-5)
    assert found.mixing_weight == 1
    seen = inspect(model, tokenizer, texts(1)["text"], seq_length=12)
    assert {each.weight for position in seen.documents[0].positions for each in position.rationales} == {1.0}
    assert "to say what follows from it" in (whole.folder / CARD_FILE).read_text()


def test_generation_says_what_follows_from_each_thought():
    """By the plain passes of the specification, token by token."""
    model = tiny.thinking_model("llama", mixing=False, mixing_head=False, thought_tokens=3, ahead_tokens=1)
    text = tiny.text(1, 6)
    options = dict(max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_thoughts=True)
    output = model.generate(text, **options)
    model.set_attn_implementation("eager")
    start, end = (torch.tensor([token]) for token in (model.qstar.start_token_id, model.qstar.end_token_id))
    row = text[0]
    for thought, said in zip(output.thoughts[0], output.sequences[0, 6:].tolist(), strict=True):
        state = reference.hidden_states(model, torch.cat([row, start, thought, end]))[-1]
        logits = reference.logits(model, state)
        logits[model.generation_config.suppress_tokens] = -torch.inf
        assert int(logits.argmax()) == said
        row = torch.cat([row, torch.tensor([said])])


def test_a_rate_of_a_mixing_head_that_is_not_there_is_refused(tmp_path):
    model = tiny.thinking_model(mixing=False, mixing_head=False, thought_tokens=2, ahead_tokens=1)
    args = QuietStarArguments(str(tmp_path), **QUIET, mixing_head_lr_factor=2.0)
    with pytest.raises(ValueError, match=r"mixing_head_lr_factor is 2\.0, but the model has no mixing head"):
        QuietStarTrainer(model, args)
    optimizer = QuietStarTrainer(model, QuietStarArguments(str(tmp_path), **QUIET)).create_optimizer()
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in learned} == {id(p) for p in model.parameters()}
