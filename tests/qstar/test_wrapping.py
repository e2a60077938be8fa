"""Models of every family: reading a grid, saving and loading, and being refused."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qstar import attention, reference, wrapping
from qstar.compatibility import check_behaviour
from qstar.config import CONFIG_FILE, QuietStarConfig
from qstar.grid import Text
from qstar.model import MIXING_HEAD_FILE
from qstar.talking import read_grid
from qstar.thinking import advance, read_on, read_text
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


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_equals_packed(family):
    model = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=2)
    tokens = tiny.text(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0
    text, grid = Text.from_inputs(tokens, mask), model.grid(7)
    thoughts = tiny.random_thoughts(model, 2, 7)
    packed = read_grid(model, text, grid, thoughts).unflatten(1, (7, grid.slots))
    rows = grid.tokens(tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    rows = rows.unflatten(1, (7, grid.slots))[:, :, 1:].unflatten(2, (grid.rationales, -1))
    reading = read_text(model, text, grid)
    torch.testing.assert_close(reading.hidden[mask.bool()], packed[:, :, 0][mask.bool()], rtol=1e-5, atol=1e-5)
    rationales = packed[:, :, 1:].unflatten(2, (grid.rationales, -1))
    for step in range(grid.rationale_length):
        states = advance(model, reading, step, rows[..., step])
        torch.testing.assert_close(states[mask.bool()], rationales[..., step, :][mask.bool()], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_thinking_at_the_last_positions_only():
    model = tiny.thinking_model("mistral", thought_tokens=2, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(2, 7)), model.grid(7)
    tokens = tiny.random_thoughts(model, 2, 7)[..., 0]
    whole = advance(model, read_text(model, text, grid), 0, tokens)
    part = advance(model, read_text(model, text, grid), 0, tokens[:, -3:])
    torch.testing.assert_close(part, whole[:, -3:], rtol=1e-5, atol=1e-5)


def test_checkpointing_changes_nothing():
    model = tiny.thinking_model("mistral", thought_tokens=2, ahead_tokens=2)
    tokens, thoughts = tiny.text(1, 6), tiny.random_thoughts(model, 1, 6)
    results = []
    from qstar.learning import Objective

    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        Objective()(model, tokens, thoughts=thoughts).loss.backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


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


REFUSED = {
    "GPTJ": (dict(n_embd=32, n_layer=1, n_head=4, rotary_dim=4), "AttentionInterface"),
    "GPTNeo": (
        dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
        "AttentionInterface",
    ),
    "Bloom": (dict(hidden_size=32, n_layer=1, n_head=4), "AttentionInterface"),
    "Mamba2": (dict(hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8, n_groups=1), ""),
    "Lfm2": (
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, layer_types=["conv", "full_attention"]),
        "linear-attention",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_models_that_cannot_think_are_refused(name):
    values, reason = REFUSED[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tiny.WORDS), **values)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    before = type(model)
    with pytest.raises(ValueError, match=f"{name}ForCausalLM.*{reason}"):
        wrap(model, tiny.tokenizer())
    assert type(model) is before


def test_a_model_that_reads_ahead_is_refused():
    model = tiny.plain_model("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config.is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention sees what comes after: it passes is_causal = False"):
        wrap(model, tiny.tokenizer())


def test_a_refused_model_is_given_back():
    model, tokenizer = tiny.plain_model("llama", vocab_size=40), tiny.tokenizer()
    before = model(tiny.text(1, 6)).logits
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 2
    with pytest.raises(ValueError, match="differs from the model's own"):
        wrap(model, tokenizer)
    del model.lm_head.forward
    assert type(model) is transformers.LlamaForCausalLM
    assert not [name for name in model.state_dict() if name.startswith("qstar")]
    assert torch.equal(model(tiny.text(1, 6)).logits, before)
    wrap(model, tokenizer)


def test_wrong_arguments_change_nothing():
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    for arguments, message in (
        (dict(thought_tokens=0), "thought_tokens is 0"),
        (dict(end_token="<|startthought|>"), "must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            wrap(model, tokenizer, **arguments)
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == len(tiny.WORDS)


def test_noise_of_every_kind_is_switched_off():
    config = transformers.OPTConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        dropout=0.3,
        attention_dropout=0.2,
    )
    model = wrap(transformers.OPTForCausalLM(config), tiny.tokenizer(), thought_tokens=2, ahead_tokens=1).train()
    text, thoughts = Text.from_inputs(tiny.text(1, 4)), tiny.random_thoughts(model, 1, 4)
    assert torch.equal(
        read_grid(model, text, model.grid(4), thoughts), read_grid(model.eval(), text, model.grid(4), thoughts)
    )


def test_a_model_that_stays_noisy_is_refused():
    model = tiny.plain_model("llama")
    norm = model.model.norm
    forward = norm.forward
    norm.forward = lambda hidden: forward(hidden) + norm.training * torch.randn_like(hidden)
    with pytest.raises(ValueError, match=r"pass in train\(\) of LlamaForCausalLM differs"):
        wrap(model, tiny.tokenizer())


def test_a_head_of_another_form_is_refused():
    model = tiny.plain_model("llama", vocab_size=40)
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: forward(hidden) * 2
    with pytest.raises(ValueError, match="output head of LlamaForCausalLM differs"):
        wrap(model, tiny.tokenizer())


def test_the_check_restores_training_mode():
    model = tiny.thinking_model("llama")
    model.train()
    model.lm_head.eval()
    check_behaviour(model)
    assert model.training
    assert not model.lm_head.training


def test_attention_dropout_is_refused_on_a_grid():
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=1)
    model.model.layers[0].self_attn.attention_dropout = 0.1
    model.train()
    text = Text.from_inputs(tiny.text(1, 4))
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1 in LlamaAttention"):
        read_grid(model, text, model.grid(4), tiny.random_thoughts(model, 1, 4))


def test_a_text_longer_than_the_model_is_refused():
    model = tiny.thinking_model("gpt2", thought_tokens=4, ahead_tokens=4)
    text = Text.from_inputs(tiny.text(1, 124))
    with pytest.raises(ValueError, match=r"124 text tokens and 9 tokens of a thought .* = 128"):
        read_grid(model, text, model.grid(124), tiny.random_thoughts(model, 1, 124))


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


@pytest.mark.parametrize("error", [TypeError, IndexError, RuntimeError, KeyError])
def test_a_model_that_breaks_on_a_thought_grid_is_refused_and_given_back(error):
    model, tokenizer = tiny.plain_model("llama", vocab_size=40), tiny.tokenizer()
    tokens = tiny.text(1, 6)
    before = model(tokens).logits
    norm = model.model.norm
    forward = norm.forward

    def fussy(hidden):
        if hidden.shape[1] == 33:  # the grid of the check
            raise error("no such mask")
        return forward(hidden)

    norm.forward = fussy
    with pytest.raises(
        ValueError, match=f"LlamaForCausalLM cannot read a thought grid: {error.__name__} in a tiny pass"
    ) as caught:
        wrap(model, tokenizer)
    assert isinstance(caught.value.__cause__, error)
    assert type(model) is transformers.LlamaForCausalLM
    assert torch.equal(model(tokens).logits, before)


LONG_ROPE = dict(
    max_position_embeddings=128,
    original_max_position_embeddings=16,
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=1e4,
        original_max_position_embeddings=16,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[2.0, 3.0, 4.0, 5.0],
    ),
)


@torch.no_grad()
@pytest.mark.parametrize("length", [10, 17, 25])
def test_rotary_factors_that_change_with_the_length_are_one_set_for_text_and_thoughts(length):
    model = tiny.thinking_model("phi3", changes=LONG_ROPE, thought_tokens=3, ahead_tokens=2, rationales=1)
    text, grid, thoughts = (
        Text.from_inputs(tiny.text(1, length)),
        model.grid(length),
        tiny.random_thoughts(model, 1, length),
    )
    packed = read_grid(model, text, grid, thoughts).unflatten(1, (length, grid.slots))
    reading = read_text(model, text, grid)
    torch.testing.assert_close(reading.hidden, packed[:, :, 0], rtol=1e-5, atol=1e-5)
    rows = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    rows = rows.unflatten(1, (length, grid.slots))
    for step in range(grid.rationale_length):
        states = advance(model, reading, step, rows[..., 1 + step, None])
        torch.testing.assert_close(states[:, :, 0], packed[:, :, 1 + step], rtol=1e-4, atol=1e-5)
    last = torch.cat([text.tokens[0], rows[0, -1, 1:]])
    torch.testing.assert_close(packed[0, -1, -1], reference.hidden_states(model, last)[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [11, 16])
def test_a_text_whose_thoughts_would_have_other_rotary_factors_is_refused(length):
    model = tiny.thinking_model("phi3", changes=LONG_ROPE, thought_tokens=3, ahead_tokens=2, rationales=1)
    text, grid = Text.from_inputs(tiny.text(1, length)), model.grid(length)
    message = f"a text of {length} tokens and 6 more cross original_max_position_embeddings = 16, where Phi3ForCausalLM"
    with pytest.raises(ValueError, match=message):
        read_text(model, text, grid)
    with pytest.raises(ValueError, match=message + ".* at most 10 tokens, or more than 16"):
        read_grid(model, text, grid, tiny.random_thoughts(model, 1, length))


def test_a_text_that_goes_on_beyond_the_limit_of_its_rotary_factors_is_refused():
    model = tiny.thinking_model("phi3", changes=LONG_ROPE, thought_tokens=3, ahead_tokens=2, rationales=1)
    tokens = tiny.text(1, 25)
    reading = read_text(model, Text.from_inputs(tokens[:, :8]), model.grid(8))
    with pytest.raises(ValueError, match="a text of 8 tokens and 23 more cross original_max_position_embeddings = 16"):
        read_on(model, reading, Text.from_inputs(tokens))


@pytest.mark.parametrize("broken", ["attach", "check_behaviour", "_initial_embedding"])
def test_whatever_fails_the_model_is_given_back_as_it_was(broken, monkeypatch):
    """Its class, its attention, its vocabulary, its dropout, its frozen weights and every value."""
    model, tokenizer = tiny.plain_model("llama"), tiny.tokenizer()
    model.model.layers[0].self_attn.attention_dropout = 0.25
    model.lm_head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    real = getattr(wrapping, broken)

    def fails(*args, **kwargs):
        real(*args, **kwargs)
        raise IndexError("half way")

    monkeypatch.setattr(wrapping, broken, fails)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot read a thought grid: IndexError in a tiny pass"):
        wrap(model, tokenizer)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config._attn_implementation == "eager"
    assert model.config.vocab_size == len(tiny.WORDS)
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert not model.lm_head.weight.requires_grad and model.model.norm.weight.requires_grad
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    monkeypatch.undo()
    assert wrap(model, tokenizer).qstar.start_token_id == len(tiny.WORDS)


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
