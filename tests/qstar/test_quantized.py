"""What can be done with quantised models is said by their configuration alone."""

from __future__ import annotations

import json

import pytest
import tiny
from tiny_folder import base_folder
from tiny_runs import tiny_train
from transformers import BitsAndBytesConfig

from qstar import wrap
from qstar.quantized import check_learnable, quantization_of

FOUR = BitsAndBytesConfig(load_in_4bit=True)
EIGHT = BitsAndBytesConfig(load_in_8bit=True)
GPTQ = {"quant_method": "gptq", "bits": 4}


def config_with(quantization):
    config = tiny.plain_model("llama").config
    config.quantization_config = quantization
    return config


@pytest.mark.parametrize("quantization", [FOUR, FOUR.to_dict()], ids=["object", "dictionary"])
def test_four_bits_learn_by_adapters_on_a_gpu(quantization):
    config = config_with(quantization)
    assert quantization_of(config)["load_in_4bit"] is True
    check_learnable(config, lora=True, device="cuda")
    with pytest.raises(ValueError, match="to 4 bits, and such weights do not learn: lora=True trains adapters"):
        check_learnable(config, lora=False, device="cuda")
    with pytest.raises(ValueError, match="to 4 bits, but it must be on a GPU to learn: on a CPU, bitsandbytes repacks"):
        check_learnable(config, lora=True, device="cpu")


def test_eight_bits_are_refused_since_states_are_rounded():
    model = tiny.plain_model("llama")
    model.config.quantization_config = EIGHT
    with pytest.raises(ValueError, match=r"quantised to 8 bits: bitsandbytes rounds the states .*load_in_4bit=True"):
        wrap(model, tiny.tokenizer())
    with pytest.raises(ValueError, match="quantised to 8 bits: bitsandbytes rounds the states"):
        check_learnable(model.config, lora=True, device="cuda")


def test_adapters_beside_another_quantisation_are_refused():
    with pytest.raises(ValueError, match="is quantised by gptq, beside which adapters have not been tried"):
        check_learnable(config_with(GPTQ), lora=True, device="cuda")
    check_learnable(config_with(GPTQ), lora=False, device="cuda")  # the Trainer decides


def test_plain_weights_learn():
    assert quantization_of(tiny.plain_model("llama").config) is None
    check_learnable(tiny.plain_model("llama").config, lora=False, device="cpu")


@pytest.mark.parametrize(
    "quantization, lora, match",
    [
        (FOUR, False, "to 4 bits, and such weights do not learn: lora=True trains adapters"),
        (FOUR, True, "must be on a GPU to learn"),
        (EIGHT, True, "quantised to 8 bits"),
        (GPTQ, True, "quantised by gptq"),
    ],
)
def test_a_run_with_a_quantised_model_is_refused_before_its_weights_are_read(tmp_path, quantization, lora, match):
    """Also a run that goes on with adapters whose base is one, and one with a model object."""
    base = base_folder(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    plain = path.read_text()
    model = tiny.plain_model("llama")
    if lora:
        tiny_train(tmp_path / "run", model=base, lora=True, max_steps=1)
    written = quantization if isinstance(quantization, dict) else quantization.to_dict()
    path.write_text(json.dumps(json.loads(plain) | {"quantization_config": written}))
    (tmp_path / "base" / "model.safetensors").unlink()
    model.config.quantization_config = quantization
    for name in (base, model, *([str(tmp_path / "run")] if lora else [])):
        settings = {} if name == str(tmp_path / "run") else {"lora": lora}
        with pytest.raises(ValueError, match=match):
            tiny_train(tmp_path / "new", model=name, **settings)
