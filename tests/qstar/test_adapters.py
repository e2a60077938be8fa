"""Adapters that come into a model in any way work, or are refused with what to do."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_folder import base_folder
from tiny_runs import tiny_train
from transformers import AutoModelForCausalLM

from qstar import Objective, load, merge_adapters, wrap
from qstar.adapters import base_of, linear_layers, resolved, save_adapters
from qstar.model import EMBEDDINGS_FILE

SETTINGS = dict(thought_tokens=2, ahead_tokens=2)
LAYERS = ["q_proj", "up_proj"]


@pytest.fixture
def base(tmp_path) -> str:
    return base_folder(tmp_path / "base")


def opened(base: str):
    return AutoModelForCausalLM.from_pretrained(base)


def with_values(model, seed: int = 3):
    """``model`` with adapters that count, where their second factors begin at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny.text(2, 7)).logits[..., : len(tiny.WORDS)]


def by_add_adapter(base: str):
    model = opened(base)
    model.add_adapter(LoraConfig(r=2, target_modules=LAYERS, lora_dropout=0.1))
    return with_values(model)


def by_peft(base: str):
    return with_values(get_peft_model(opened(base), LoraConfig(r=2, target_modules=LAYERS, lora_dropout=0.1)))


@pytest.mark.parametrize("way", ["add_adapter", "get_base_model", "add_adapter, wrapped", "get_base_model, wrapped"])
def test_a_model_with_adapters_from_outside_trains_and_loads_again(tmp_path, base, way, caplog):
    model = by_add_adapter(base) if way.startswith("add_adapter") else by_peft(base).get_base_model()
    before = logits(model)
    if way.endswith("wrapped"):
        model = wrap(model, tiny.tokenizer(), **SETTINGS)
        assert "noise is set to 0" in caplog.text
        assert torch.allclose(logits(model), before, atol=1e-6)
    result = tiny_train(tmp_path / "run", model=model, learning_rate=1e-3)
    assert not torch.allclose(logits(result.model), before, atol=1e-3)
    after, _ = load(tmp_path / "run")
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["lora_dropout"]) == (base, 0.0)


def test_peft_around_a_model_that_thinks_is_taken_off_and_the_thoughts_learn(tmp_path, base):
    """peft freezes the mixing head and the thought embeddings as well."""
    around = get_peft_model(wrap(opened(base), tiny.tokenizer(), **SETTINGS), LoraConfig(r=2, target_modules=LAYERS))
    with pytest.raises(TypeError, match=r"it is a PeftModel around one: .* model\.get_base_model\(\)"):
        tiny_train(tmp_path / "run", model=around)
    inside = around.get_base_model()
    before = inside.qstar_mixing_head.output.weight.detach().clone()
    result = tiny_train(tmp_path / "run", model=inside, learning_rate=1e-3)
    assert not torch.equal(result.model.qstar_mixing_head.output.weight, before)
    head = load(tmp_path / "run")[0].qstar_mixing_head.output.weight
    assert torch.equal(head, result.model.qstar_mixing_head.output.weight)


def test_a_peft_model_is_refused_with_what_to_do(base):
    with pytest.raises(TypeError, match=r"it is a PeftModel around one: .* model\.get_base_model\(\)"):
        wrap(by_peft(base), tiny.tokenizer())


def test_a_loop_of_ones_own_adds_adapters_after_wrapping():
    """Gradients are those of float64 differences: of an adapter, of the mixing head and of a thought embedding."""
    model = wrap(tiny.plain_model("gpt2").double(), tiny.tokenizer(), **SETTINGS)
    model.add_adapter(LoraConfig(r=2))
    with_values(model)
    torch.nn.init.normal_(model.qstar_mixing_head.output.weight)
    tokens = tiny.text(2, 7)
    objective = Objective(seed=1, policy_weight=0.0)
    thoughts = model(input_ids=tokens, objective=objective).thoughts
    loss = model(input_ids=tokens, objective=objective).loss
    loss.backward()
    named = dict(model.named_parameters())
    assert {name for name, x in named.items() if x.grad is None} == {n for n, x in named.items() if not x.requires_grad}
    for name in ("transformer.h.0.mlp.c_fc.lora_B.default.weight", "qstar_mixing_head.hidden.weight", "qstar_end"):
        parameter = named[name]
        place = int(parameter.grad.abs().argmax())
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.view(-1)[place] += step
                output = model(input_ids=tokens, objective=objective)
                parameter.view(-1)[place] -= step
            assert torch.equal(output.thoughts, thoughts)
            values.append(output.loss)
        assert float(parameter.grad.view(-1)[place]) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-5)


def test_merged_in_place_by_peft_it_is_refused_and_merged_for_good_it_is_ordinary(tmp_path, base):
    around = by_peft(base)
    before = logits(around)
    around.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged, disabled or not active in model\.layers\.0.*unmerge"):
        wrap(around.get_base_model(), tiny.tokenizer())
    around.unmerge_adapter()
    model = wrap(around.merge_and_unload(), tiny.tokenizer(), **SETTINGS)
    model.save_pretrained(tmp_path / "saved")
    tiny.tokenizer().save_pretrained(tmp_path / "saved")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), before, atol=1e-5)


@pytest.mark.parametrize(
    "change, match",
    [
        (
            dict(lora_dropout=0.1),
            r"lora_dropout = 0\.1, but it must be left at 0\.0: a thought must be scored by the model",
        ),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\].*the mixing head and the thought"),
        (dict(trainable_token_indices=[1]), "trainable_token_indices.*the thought embeddings learn by themselves"),
        (dict(bias="all"), "bias = 'all', but it must be left at 'none': nobody has tried it"),
        (dict(layer_replication=[(0, 2), (1, 2)]), "layer_replication.*nobody has tried it"),
        (dict(init_lora_weights="olora"), "init_lora_weights = 'olora'.*change the weights of the base"),
        (
            dict(target_modules=["embed_tokens"]),
            r"lora is for model\.embed_tokens, but adapters must be of layers inside",
        ),
        (dict(target_modules=["lm_head", "q_proj"]), "lora is for lm_head, but adapters must be of layers inside"),
        (dict(target_modules=r".*mixing_head\.hidden"), r"lora is for qstar_mixing_head\.hidden, but"),
        (dict(target_parameters=["lm_head.weight"]), "lora is for lm_head, but adapters must be of layers inside"),
        (dict(target_modules=["c_attn"]), r"lora is for \{'c_attn'\}, but LlamaForCausalLM has no such layer"),
    ],
)
def test_a_config_that_would_be_ignored_or_go_wrong_is_refused(change, match):
    model = tiny.thinking_model("llama", **SETTINGS)
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=match):
        model.add_adapter(LoraConfig(**change))
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    "config, match",
    [
        (LoraConfig(target_modules=["lm_head"]), "lora is for lm_head, but adapters must be of layers inside"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), "modules_to_save"),
        (
            IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
            "adapters by a IA3Config, but only those of a Lora",
        ),
    ],
)
def test_adapters_from_outside_that_could_not_learn_are_refused(config, match):
    model = tiny.plain_model("llama")
    model.add_adapter(config)
    with pytest.raises(ValueError, match=match):
        wrap(model, tiny.tokenizer())


def test_several_adapters_are_refused_and_so_are_disabled_ones():
    model = tiny.plain_model("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "one")
    model.disable_adapters()
    with pytest.raises(ValueError, match="merged, disabled or not active in model"):
        wrap(model, tiny.tokenizer())
    model.add_adapter(LoraConfig(target_modules=["v_proj"]), "two")
    with pytest.raises(ValueError, match=r"has 2 adapters, one, two, but it must have one: model\.delete_adapter"):
        wrap(model, tiny.tokenizer())


def test_what_is_no_config_is_refused():
    model = tiny.thinking_model("llama", **SETTINGS)
    with pytest.raises(TypeError, match=r"lora is 8, but it must be True, False or a peft\.LoraConfig"):
        model.add_adapter(8)


@pytest.mark.parametrize(
    "family, layers",
    [
        ("gpt2", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
        ("gpt_neox", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
        ("gpt_oss", [f"self_attn.{name}_proj" for name in "qkvo"]),
    ],
)
def test_all_linear_layers_of_the_decoders_layers_have_adapters(family, layers):
    """Not the mixing head's, whose names may end alike; experts of one tensor have none."""
    model = tiny.thinking_model(family, **SETTINGS)
    found = linear_layers(model)
    assert [name.split(".", 3)[3] for name in found if ".0." in name] == layers
    model.add_adapter(LoraConfig(target_modules="all-linear", r=1))
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == set(found)


def test_layers_outside_that_are_called_alike_are_left_out():
    model = tiny.thinking_model("llama", **SETTINGS)
    layer = model.model.layers[0].mlp
    layer.hidden = torch.nn.Linear(3, 3)  # as one of the mixing head
    config = resolved(model, LoraConfig(exclude_modules=["v_proj"]))
    assert config.exclude_modules == ["v_proj", "qstar_mixing_head.hidden"]
    pattern = resolved(model, LoraConfig(exclude_modules=r".*\.v_proj"))
    assert pattern.exclude_modules == r".*\.v_proj|qstar_mixing_head\.hidden"
    model.add_adapter(pattern)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert "model.layers.0.mlp.hidden" in adapted
    assert not any(name.endswith("v_proj") or name.startswith("qstar") for name in adapted)


def test_the_base_is_named_with_its_revision_or_by_its_whole_path(tmp_path, base, monkeypatch):
    model = opened(base)
    monkeypatch.chdir(tmp_path)
    model.name_or_path = "base"
    assert base_of(model) == (base, None)
    model.name_or_path, model.config._commit_hash = "somebody/base", "0123456789abcdef"
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    save_adapters(model, tmp_path, model.state_dict())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/base", "0123456789abcdef")
    model.name_or_path = ""
    with pytest.raises(ValueError, match="no name by which adapters could find it again: save it, and begin with its"):
        base_of(model)


def test_rows_of_tokens_that_the_base_lacks_come_back_bit_for_bit(tmp_path, base):
    """One of a tokenizer's token that the base never had stands between its words and the thought tokens."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["extra"])
    model = wrap(opened(base), tokenizer, **SETTINGS)
    model.add_adapter(LoraConfig(r=2))
    model.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    again, _ = load(tmp_path / "run")
    assert again.qstar_base_vocabulary == 30 and len(again.lm_head.weight) == 33
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.fixture
def saved(tmp_path, base):
    model = wrap(opened(base), tiny.tokenizer(), **SETTINGS)
    model.add_adapter(LoraConfig(r=2))
    model.save_pretrained(tmp_path / "run")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|startthought|>", "<|endthought|>"])
    tokenizer.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_a_folder_of_adapters_is_read_in_the_precision_that_they_were_trained_beside(tmp_path, base, saved):
    assert load(saved)[0].dtype == torch.float32
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | dict(dtype="bfloat16")))
    assert opened(base).dtype == torch.bfloat16
    assert load(saved)[0].model.layers[0].mlp.down_proj.base_layer.weight.dtype == torch.float32
    assert load(saved, dtype=torch.bfloat16)[0].model.layers[0].mlp.down_proj.base_layer.weight.dtype == torch.bfloat16


def test_a_folder_whose_parts_are_gone_or_of_others_is_refused(tmp_path, base, saved):
    other = base_folder(tmp_path / "other", vocab_size=40)
    config = json.loads((saved / "adapter_config.json").read_text())

    def named(**changes):
        (saved / "adapter_config.json").write_text(json.dumps(config | changes))

    named(base_model_name_or_path=other)
    with pytest.raises(ValueError, match=r"is of a base with 30 rows in its vocabulary, but that of .*other has 40"):
        load(saved)
    named(base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"adapters of the model in .*gone, says its adapter_config\.json"):
        load(saved)
    named(base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"its adapter_config\.json names no base_model_name_or_path"):
        load(saved)
    named(r=4)
    with pytest.raises(ValueError, match=r"lora_A\.weight is \(2, .*\), but the model's is \(4, "):
        load(saved)
    named()
    load(saved)
    (saved / EMBEDDINGS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"thought_embeddings\.safetensors: the thought embeddings are missing"):
        load(saved)


def test_a_folder_is_of_a_model_or_of_adapters(tmp_path, base, saved):
    """Saved over each other, one would be read as the other."""
    model, _ = load(saved)
    with pytest.raises(ValueError, match="base holds a whole model, and the adapters of this one would be taken for"):
        model.save_pretrained(base)
    with pytest.raises(ValueError, match="max_shard_size given, but a folder of adapters holds no files of the base"):
        model.save_pretrained(saved, max_shard_size="1GB")
    merge_adapters(model)
    with pytest.raises(ValueError, match="run holds adapters, which would be added to this model when it is loaded"):
        model.save_pretrained(saved)


def test_only_adapters_of_plain_weights_are_merged():
    model = tiny.thinking_model("llama", **SETTINGS)
    with pytest.raises(ValueError, match="the model has no adapters that could be merged"):
        merge_adapters(model)
    model.add_adapter(LoraConfig(r=2))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="weights are quantised, and adapters added to them would be rounded"):
        merge_adapters(model)
    del model.config.quantization_config
    merged = merge_adapters(with_values(model))
    assert all(parameter.requires_grad for parameter in merged.parameters())
    merged.add_adapter(LoraConfig(r=2))  # as to any other
    assert not merged.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad


def test_adapters_of_a_model_that_no_folder_holds_are_not_saved(tmp_path, saved):
    """Merged or trained, its weights are no more those of the base whose name it had."""
    model = merge_adapters(load(saved)[0])
    model.add_adapter(LoraConfig(r=2))
    with pytest.raises(ValueError, match="no name by which adapters could find it again"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_was_trained_as_a_whole_is_the_base_of_its_folder(tmp_path, base):
    whole = tiny_train(tmp_path / "whole", model=base, learning_rate=1e-3)
    result = tiny_train(tmp_path / "run", model=whole.model, lora=True, learning_rate=1e-3)
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "run")[0]), logits(result.model))


def test_a_base_with_other_weights_is_refused(tmp_path, base, saved):
    model = opened(base)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 3] *= 1.0001
    model.save_pretrained(base)
    with pytest.raises(ValueError, match=r"its model\.layers\.1\.mlp\.gate_proj\.weight is not what it was beside"):
        load(saved)


def test_a_folder_of_pefts_own_learns_to_think(tmp_path, base):
    """transformers opens it with adapters that are frozen."""
    by_peft(base).save_pretrained(tmp_path / "adapters")
    tiny.tokenizer().save_pretrained(tmp_path / "adapters")
    result = tiny_train(tmp_path / "run", model=str(tmp_path / "adapters"), learning_rate=1e-3)
    before = dict(by_peft(base).get_base_model().named_parameters())
    moved = [name for name, x in result.model.named_parameters() if name in before and not torch.equal(x, before[name])]
    assert set(moved) == {name for name in before if ".lora_" in name} | {"model.embed_tokens.weight", "lm_head.weight"}
    assert torch.equal(logits(load(tmp_path / "run")[0]), logits(result.model))


def test_without_peft_it_is_said_what_to_install(tmp_path, base, saved, monkeypatch):
    model = tiny.thinking_model("llama", **SETTINGS)
    config = LoraConfig(r=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (
        lambda: model.add_adapter(config),
        lambda: load(saved),
        lambda: tiny_train(tmp_path, model=base, lora=True),
    ):
        with pytest.raises(
            ValueError, match=r"adapters \(LoRA\) need the package peft, .* not installed: pip install peft"
        ):
            call()
