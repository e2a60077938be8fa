"""What ``wrap`` finds before anything is trained: errors that weights, noise or 16 bits would hide."""

from __future__ import annotations

import logging

import every_model
import pytest
import tiny
import torch
import transformers

from qstar import wrap
from qstar.compatibility import MOST_PARAMETERS, plain_passes, small_copy
from qstar.model import QuietStarModel


def fresh(model_type: str, **changes) -> transformers.PreTrainedModel:
    """A model of ``model_type`` as it is initialized, with other settings of its text part."""
    config = every_model.fresh_model(model_type).config
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    kind = every_model.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_soft_cap_that_small_logits_hide_is_found(dtype):
    """Gemma 3 with images does not apply it: 7e-5 of fresh logits, all of trained ones."""
    with pytest.raises(ValueError, match=r"output head of Gemma3ForConditionalGeneration differs .* 1e-04 is allowed"):
        wrap(fresh("gemma3", final_logit_softcapping=3.0).to(dtype), tiny.tokenizer())
    wrap(fresh("gemma3").to(dtype), tiny.tokenizer())


def test_a_scaling_that_16_bits_hide_is_found():
    """HyperCLOVA X multiplies by 0.99 where others divide; 2 percent are lost beside what 16 bits are allowed."""
    with pytest.raises(ValueError, match=r"output head of HyperCLOVAXForCausalLM differs .* 1e-04 is allowed"):
        wrap(fresh("hyperclovax", logits_scaling=0.99).bfloat16(), tiny.tokenizer())


def test_inputs_of_every_layer_behind_gates_of_zero_are_found_missing(monkeypatch):
    model = fresh("gemma3n_text")
    gates = [p for name, p in model.named_parameters() if name.endswith("correct_output_scale")]
    assert gates and not any(gate.any() for gate in gates)
    monkeypatch.setattr(QuietStarModel, "_per_layer_inputs", lambda self, tokens: {})
    with pytest.raises(ValueError, match=r"pass of Gemma3nForCausalLM differs .* 1e-04 is allowed"):
        wrap(model, tiny.tokenizer())


@torch.no_grad()
def test_noise_that_counts_in_eval_is_not_switched_off():
    model, tokens = fresh("phimoe"), tiny.text(1, 6)
    before = model(tokens).logits
    message = r"PhimoeForCausalLM takes noise in eval\(\) as well \(PhimoeTopKRouter.router_jitter_noise = 0.01\)"
    with pytest.raises(ValueError, match=message):
        wrap(model, tiny.tokenizer())
    assert torch.equal(model(tokens).logits, before)
    without = fresh("phimoe", router_jitter_noise=0.0)
    before = without(tokens).logits
    torch.testing.assert_close(wrap(without, tiny.tokenizer())(tokens).logits, before, rtol=1e-5, atol=1e-5)


def test_an_attention_that_makes_another_model_is_refused():
    with pytest.raises(ValueError, match=r"plain pass of GitForCausalLM differs .* with its attention exchanged"):
        wrap(fresh("git"), tiny.tokenizer())


def test_experts_that_flip_in_16_bits_are_no_error():
    for model_type in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"):
        wrap(every_model.tiny_model(model_type).bfloat16(), tiny.tokenizer())


def test_an_auxiliary_loss_that_is_left_out_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        wrap(fresh("mixtral"), tiny.tokenizer())
        assert "output_router_logits" not in caplog.text
        wrap(fresh("mixtral", output_router_logits=True), tiny.tokenizer())
    assert "output_router_logits is True, but the auxiliary loss" in caplog.text


def test_a_small_copy_has_a_layer_of_each_kind_and_no_more_than_a_gigabyte():
    with torch.device("meta"):
        config = transformers.Gemma2Config(num_hidden_layers=42, hidden_size=3584, intermediate_size=14336)
        small = small_copy(transformers.Gemma2ForCausalLM(config).bfloat16())
    assert small.dtype == torch.float32 and small.device.type == "cpu"
    assert set(small.config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.config.hidden_size == 3584
    assert sum(p.numel() for p in small.parameters()) < MOST_PARAMETERS
    assert config.num_hidden_layers == 42 and config.vocab_size == 256000


def test_a_check_draws_no_random_numbers():
    model = fresh("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert small_copy(model) is not None
    plain_passes(model, 30, 31)
    assert torch.equal(torch.rand(3), expected)
