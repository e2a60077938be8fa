"""From a live model to one that thinks, to a folder and back."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar import attention
from qstar.config import CONFIG_FILE, QuietStarConfig
from qstar.grid import Text
from qstar.model import MIXING_HEAD_FILE
from qstar.talking import read_grid
from qstar.wrapping import load, wrap

FAMILIES = sorted(tiny.FAMILIES)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_use_is_unchanged(family):
    """The promise to other projects: without a thought grid, ``qstar`` is what the model had."""
    model = tiny.plain_model(family)
    tokens = tiny.text(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    eager = model(tokens, attention_mask=mask).logits
    generated = model.generate(tokens, attention_mask=mask, **options)
    model.set_attn_implementation(attention.NAME)
    torch.testing.assert_close(
        model(tokens, attention_mask=mask).logits[mask.bool()], eager[mask.bool()], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(model.generate(tokens, attention_mask=mask, **options), generated)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    model, tokenizer = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=2), tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startthought|>", "<|endthought|>"]})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, words = load(tmp_path)
    assert again.qstar == model.qstar
    assert words.convert_tokens_to_ids("<|endthought|>") == model.qstar.end_token_id
    state = model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    text, grid = Text.from_inputs(tiny.text(1, 6)), model.grid(6)
    thoughts = tiny.random_thoughts(model, 1, 6)
    assert torch.equal(read_grid(again, text, grid, thoughts), read_grid(model, text, grid, thoughts))


@torch.no_grad()
def test_a_saved_folder_is_an_ordinary_checkpoint(tmp_path, caplog):
    model = tiny.thinking_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "qstar" not in (tmp_path / "config.json").read_text()
    with caplog.at_level(logging.WARNING):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not caplog.records
    assert type(plain) is transformers.LlamaForCausalLM
    tokens = tiny.text(2, 8)
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    rows = plain.get_input_embeddings().weight
    assert torch.equal(rows[model.qstar.start_token_id], model.qstar_start)
    generated = plain.generate(tokens, max_new_tokens=20, do_sample=True, pad_token_id=0)
    assert not torch.isin(generated, torch.tensor([model.qstar.start_token_id, model.qstar.end_token_id])).any()


def test_a_folder_that_lacks_something(tmp_path):
    model = tiny.thinking_model("llama")
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / MIXING_HEAD_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="mixing head is missing"):
        load(tmp_path)
    (tmp_path / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="not the folder of a Quiet-STaR model"):
        load(tmp_path)


def test_wrapping_keeps_special_tokens_and_predictions():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<keep>"]})
    model = tiny.plain_model("llama")
    tokens = tiny.text(1, 6)
    before = model(tokens).logits
    wrap(model, tokenizer)
    assert "<keep>" in tokenizer.all_special_tokens
    torch.testing.assert_close(model(tokens).logits[..., : len(tiny.WORDS)], before, rtol=1e-5, atol=1e-5)
    dashes = tokenizer.convert_tokens_to_ids("---")
    assert torch.equal(model.qstar_start, model.get_input_embeddings().weight[dashes])


def test_wrapping_draws_no_tokens_at_random():
    def wrapped():
        model = tiny.plain_model("llama")
        torch.manual_seed(5)
        return wrap(model, tiny.tokenizer())

    first, second = wrapped().state_dict(), wrapped().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_arguments_change_nothing():
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    for arguments, message in (
        (dict(thought_tokens=0), "thought_tokens is 0"),
        (dict(end_token="<|startthought|>"), "must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            wrap(model, tokenizer, **arguments)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == len(tiny.WORDS)


@pytest.mark.parametrize("name", ["thought_tokens", "ahead_tokens", "rationales"])
def test_wrong_sizes_are_named(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        QuietStarConfig(start_token_id=1, end_token_id=2, **{name: 0})


def test_tokenizer_of_a_saved_folder(tmp_path):
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    wrap(model, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids("<|startthought|>") == model.qstar.start_token_id


def test_token_ids_with_gaps_make_room_and_never_shrink_the_vocabulary():
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startthought|>", "<|endthought|>"]})
    ids = {"<|startthought|>": 90, "<|endthought|>": 95}
    plain = tokenizer.convert_tokens_to_ids
    tokenizer.convert_tokens_to_ids = lambda token: ids[token] if token in ids else plain(token)
    model = tiny.plain_model("llama", vocab_size=50)
    rows = model.get_input_embeddings().weight.detach().clone()
    model = wrap(model, tokenizer, thought_tokens=2, ahead_tokens=1)
    assert model.get_input_embeddings().weight.shape[0] == 96
    assert torch.equal(model.get_input_embeddings().weight.detach()[:50], rows)


def test_a_folder_s_own_code_is_not_run(tmp_path, monkeypatch):
    """Whatever is typed at a prompt: a folder with code of its own is refused."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= dict(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the folder was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises((ValueError, OSError)):
        load(tmp_path)
