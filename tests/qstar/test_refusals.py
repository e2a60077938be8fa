"""Models that cannot think are refused with a reason, and given back as they were."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from qstar import wrapping
from qstar.compatibility import check_behaviour
from qstar.grid import Text
from qstar.talking import read_grid
from qstar.wrapping import wrap

REFUSED = {
    "Falcon": (dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4), "AttentionInterface"),
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
