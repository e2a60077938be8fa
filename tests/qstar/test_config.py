"""Each setting of the thoughts has one home, which ``wrap``, ``train``, the flags and the saved file take it from."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
import tiny
import torch

from qstar.config import CONFIG_FILE, QuietStarConfig, ThoughtSettings
from qstar.model import MIXING_HEAD_FILE
from qstar.wrapping import load, wrap

CHANGED = dict(
    thought_tokens=3,
    ahead_tokens=2,
    rationales=1,
    mixing_head=True,
    sigmoid=True,
    pauses=True,
    start_token="<think>",
    end_token="</think>",
    start_init="a b",
    end_init=None,
)


def test_every_setting_has_a_default_and_help_that_is_a_sentence():
    for each in fields(ThoughtSettings):
        assert each.metadata["help"].endswith("."), each.name
    assert set(CHANGED) == {each.name for each in fields(ThoughtSettings)}
    assert ThoughtSettings() == replace(ThoughtSettings(), thought_tokens=8, ahead_tokens=4, rationales=2)


def test_every_setting_of_wrap_is_stored_and_saved(tmp_path):
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    rows = model.get_input_embeddings().weight.detach().clone()
    model = wrap(model, tokenizer, **CHANGED)
    start, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    unnamed = dict(base_model=None, base_revision=None)
    assert asdict(model.qstar) == CHANGED | dict(start_token_id=start, end_token_id=end) | unnamed
    words = tokenizer.convert_tokens_to_ids(["a", "b"])
    torch.testing.assert_close(model.qstar_start.detach(), rows[words].mean(0))
    torch.testing.assert_close(model.qstar_end.detach(), rows.mean(0))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text()) == asdict(model.qstar)
    again, words = load(tmp_path)
    assert again.qstar == model.qstar
    assert words.convert_tokens_to_ids("<think>") == start


@pytest.mark.parametrize("init", [None, ""])
def test_a_token_without_a_text_begins_with_the_mean_of_the_vocabulary(init):
    model, tokenizer = tiny.plain_model("llama", vocab_size=40), tiny.tokenizer()
    mean = model.get_input_embeddings().weight.detach().mean(0)
    assert torch.equal(wrap(model, tokenizer, start_init=init).qstar_start.detach(), mean)


@pytest.mark.parametrize("name", ["thought_tokens", "ahead_tokens", "rationales"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_a_wrong_size_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}, but it must be an integer of at least 1"):
        QuietStarConfig(start_token_id=1, end_token_id=2, **{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sigmoid="no"), "sigmoid is 'no', but it must be True or False"),
        (dict(mixing_head=None), "mixing_head is None, but it must be True or False"),
        (
            dict(mixing_head=False, sigmoid=True),
            "sigmoid is True, but mixing_head is False: there is no weight to hold in 0..1",
        ),
        (dict(pauses=1), "pauses is 1, but it must be True or False"),
        (dict(start_init=3), "start_init is 3, but it must be a text, or None for the mean of the vocabulary"),
        (dict(start_token=""), "start_token is '', but it must be the text of a token"),
        (dict(end_token=7), "end_token is 7, but it must be the text of a token"),
        (dict(end_token="<|startthought|>"), "end_token is '<|startthought|>', but it must differ from start_token"),
    ],
)
def test_a_wrong_setting_of_another_kind_is_named(settings, message):
    with pytest.raises(ValueError) as caught:
        ThoughtSettings(**settings)
    assert str(caught.value) == message


def test_a_model_without_a_mixing_head_is_saved_and_loaded_without_one(tmp_path):
    model, tokenizer = tiny.thinking_model(mixing=False, mixing_head=False, thought_tokens=2), tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [model.qstar.start_token, model.qstar.end_token]})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / MIXING_HEAD_FILE).exists()
    again, _ = load(tmp_path)
    assert again.qstar == model.qstar and not again.qstar.mixing_head
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not any("mixing_head" in name for name in again.state_dict())
    options = dict(max_new_tokens=3, return_dict_in_generate=True, output_thoughts=True)
    ours, theirs = (each.generate(tiny.text(1, 6), **options) for each in (model, again))
    assert torch.equal(ours.thoughts, theirs.thoughts) and torch.equal(ours.sequences, theirs.sequences)
    assert (ours.thought_weights == 1).all()


def test_a_setting_that_does_not_exist_is_named_with_the_one_that_was_meant():
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    with pytest.raises(TypeError, match=r"wrap\(\) has no setting 'thought_token'; did you mean 'thought_tokens'\?"):
        wrap(model, tokenizer, thought_token=3)
    assert len(tokenizer) == len(tiny.WORDS)


def test_a_saved_setting_that_is_not_known_is_refused(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(dict(start_token_id=1, end_token_id=2, colour="blue")))
    with pytest.raises(ValueError, match="holds unknown settings: colour"):
        QuietStarConfig.load(tmp_path)


def test_an_earlier_folder_that_does_not_name_its_tokens_is_asked_by_their_ids(tmp_path):
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    model = wrap(model, tokenizer, start_token="<s>", thought_tokens=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    for name in ("start_token", "end_token", "start_init", "end_init", "mixing_head"):
        del values[name]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    assert load(tmp_path)[0].qstar == model.qstar


def test_a_token_without_a_row_begins_with_the_mean():
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    mean = model.get_input_embeddings().weight.detach().mean(0)
    tokenizer.add_tokens(["newword"])
    assert torch.equal(wrap(model, tokenizer, start_init="newword").qstar_start.detach(), mean)
