"""Adapters learn beside a frozen model: trained, saved, loaded, merged and resumed, they are the same numbers."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from tiny_folder import base_folder
from tiny_runs import records, texts, tiny_train
from transformers import AutoModelForCausalLM

from qstar import Objective, evaluate, load, merge_adapters
from qstar.model import PREFIX
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

LORA = dict(lora=True, lora_rank=3, learning_rate=1e-3)
SAVED = dict(save_strategy="steps", save_steps=2, max_steps=4)
FAMILIES = {"llama": {}, "llama, tied": {"tie_word_embeddings": True}, "gpt2": {}, "gemma2": {}}
each_family = pytest.mark.parametrize("family", FAMILIES)
EXPERTS = "deepseek_v3"
and_experts = pytest.mark.parametrize("family", [*FAMILIES, EXPERTS])
OTHERS = [pytest.param(each, marks=pytest.mark.slow) for each in tiny.FAMILIES if each not in (*FAMILIES, EXPERTS)]
CAPPED = dict(gemma2=dict(attn_implementation="eager"))  # sdpa, which transformers 5.17 takes for it, has no soft-cap


def learned(model) -> dict[str, torch.Tensor]:
    """What learns, by name."""
    return {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}


def sha256(model) -> str:
    """Of everything that learns."""
    digest = hashlib.sha256()
    for name, tensor in sorted(learned(model).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def says(model) -> dict[str, torch.Tensor]:
    """The thoughts of a model about a text, its loss, and its logits of the words that the base knows."""
    model.eval()
    tokens = tiny.text(2, 9, seed=5)
    output = model(input_ids=tokens, objective=Objective(seed=4))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[..., : len(tiny.WORDS)]
    return {"thoughts": output.thoughts, "loss": output.loss.detach(), "logits": logits}


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.detach().double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("family", [*FAMILIES, EXPERTS, *OTHERS])
def test_trained_saved_loaded_and_merged_is_the_same_model(tmp_path, family):
    """Loaded bit for bit; merged to 1e-6, also where plain transformers loads it."""
    base = base_folder(tmp_path / "base", family.split(",")[0], **FAMILIES.get(family, {}))
    trained = tiny_train(tmp_path / "run", model=base, **LORA).model
    before = says(trained)
    loaded, tokenizer = load(tmp_path / "run")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = says(loaded)
    for name, value in before.items():
        assert torch.equal(again[name], value), name

    merged = merge_adapters(loaded)
    assert merged is loaded and not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for model in (merged, load(tmp_path / "merged")[0]):
        after = says(model)
        assert torch.equal(after["thoughts"], before["thoughts"])
        for name in ("loss", "logits"):
            assert relative_error(after[name], before[name]) < 1e-6, name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **CAPPED.get(family, {}))
    logits = plain(input_ids=tiny.text(2, 9, seed=5)).logits[..., : len(tiny.WORDS)]
    assert relative_error(logits, before["logits"]) < 1e-6
    unmerged = AutoModelForCausalLM.from_pretrained(base, **CAPPED.get(family, {}))
    logits = unmerged(input_ids=tiny.text(2, 9, seed=5)).logits
    assert relative_error(logits, before["logits"]) > 1e-3, "the adapters have learned"


@each_family
def test_the_base_is_bit_for_bit_what_it_was_and_all_else_learns(tmp_path, family):
    base = base_folder(tmp_path / "base", family.split(",")[0], **FAMILIES.get(family, {}))
    result = tiny_train(tmp_path / "run", model=base, **LORA)
    after = {name.replace(".base_layer.", "."): x for name, x in result.model.named_parameters()}
    for name, before in AutoModelForCausalLM.from_pretrained(base).named_parameters():
        assert torch.equal(after[name][: len(before)], before), name
        assert not after[name].requires_grad, name
    names = learned(result.model)
    assert {name for name in names if ".lora_" not in name} == {
        name for name, _ in result.model.named_parameters() if name.startswith(PREFIX)
    }
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name}
    llama = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert layers == ({"c_attn", "c_proj", "c_fc"} if family == "gpt2" else llama)
    assert all(x.any() for name, x in learned(result.model).items() if ".lora_B." in name), "which begin at 0"


@and_experts
def test_peft_reads_the_folder(tmp_path, family):
    """Without thoughts: the base with its adapters says the same words."""
    base = base_folder(tmp_path / "base", family.split(",")[0], **FAMILIES.get(family, {}))
    trained = tiny_train(tmp_path / "run", model=base, **LORA).model
    logits = says(trained)["logits"]
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"], config["r"]) == (base, None, 3)
    for model in (
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, **CAPPED.get(family, {})), tmp_path / "run"
        ),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", **CAPPED.get(family, {})),
        AutoModelForCausalLM.from_pretrained(tmp_path / "run", **CAPPED.get(family, {})),
    ):
        found = model.eval()(input_ids=tiny.text(2, 9, seed=5)).logits[..., : len(tiny.WORDS)]
        assert relative_error(found, logits) < 1e-6, type(model).__name__


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    base = base_folder(tmp_path / "base")
    whole = tiny_train(tmp_path / "whole", model=base, **LORA, **SAVED)
    compute, steps = QuietStarTrainer.compute_loss, []

    def killed(trainer, *args, **kwargs):
        steps.append(trainer.state.global_step)
        if steps == [0, 1, 2]:
            raise KeyboardInterrupt
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path / "cut", model=base, **LORA, **SAVED)
    resumed = tiny_train(tmp_path / "cut", model=base, resume_from_checkpoint=True, **LORA, **SAVED)
    assert steps == [0, 1, 2, 2, 3]
    assert sha256(resumed.model) == sha256(whole.model)
    assert sha256(load(tmp_path / "cut")[0]) == sha256(whole.model)


def test_a_checkpoint_holds_what_learns_and_a_flipped_bit_in_it_is_noticed(tmp_path, caplog):
    base = base_folder(tmp_path / "base")
    tiny_train(tmp_path / "run", model=base, **LORA, **SAVED)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    manifest = {
        entry["name"]: entry["size"] for entry in json.loads((checkpoint / "manifest.json").read_text())["files"]
    }
    weights = {"adapter_model.safetensors", "qstar/mixing_head.safetensors", "qstar/thought_embeddings.safetensors"}
    assert weights | {"adapter_config.json", "qstar_config.json"} <= manifest.keys()
    assert "model.safetensors" not in manifest and "config.json" not in manifest
    for name in weights:
        path = checkpoint / name
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        tiny_train(tmp_path / "run", model=base, resume_from_checkpoint=True, **LORA, **(SAVED | dict(max_steps=2)))
        assert f"checkpoint-4 is left out: {name} is not what was written" in caplog.text
        caplog.clear()
        data[-5] ^= 1
        path.write_bytes(data)


def test_the_model_that_is_kept_as_the_best_is_the_best(tmp_path):
    base = base_folder(tmp_path / "base")
    options = dict(max_steps=3, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    options |= dict(eval_dataset=texts(4), metric_for_best_model="eval_nll_talk", load_best_model_at_end=True)
    result = tiny_train(tmp_path / "run", model=base, **(LORA | dict(learning_rate=0.3)), **options)
    found = {r["step"]: r["eval_nll_talk"] for r in records(tmp_path / "run") if "eval_nll_talk" in r}
    best = min(found, key=found.get)
    assert max(found, key=found.get) != best
    assert sha256(result.model) == sha256(load(tmp_path / "run" / f"checkpoint-{best}")[0])


def test_gradient_checkpointing_changes_nothing(tmp_path):
    base = base_folder(tmp_path / "base")
    plain = tiny_train(tmp_path / "plain", model=base, **LORA)
    saving = tiny_train(tmp_path / "saving", model=base, gradient_checkpointing=True, **LORA)
    for name, tensor in learned(plain.model).items():
        assert torch.equal(learned(saving.model)[name], tensor), name


def test_accumulation_changes_nothing(tmp_path):
    base = base_folder(tmp_path / "base")
    options = LORA | dict(max_steps=2)
    one = tiny_train(tmp_path / "one", model=base, **options)
    two = tiny_train(tmp_path / "two", model=base, batch_size=1, gradient_accumulation_steps=2, **options)
    losses = [[r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in learned(one.model).items():
        assert torch.allclose(learned(two.model)[name], tensor, atol=2e-4), name


def test_each_part_learns_at_its_own_rate(tmp_path, monkeypatch):
    """After one step of Adam, each weight has moved by its learning rate, or not at all."""
    base = base_folder(tmp_path / "base")
    settings = dict(lora=True, learning_rate=1e-4, lora_lr_factor=7.0, mixing_head_lr_factor=3.0, weight_decay=0.0)
    settings |= dict(max_steps=1, lr_scheduler_type="constant")
    before = {}
    train = QuietStarTrainer.train

    def watched(trainer, *args, **kwargs):
        before.update({name: x.clone() for name, x in learned(trainer.model).items()})
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(QuietStarTrainer, "train", watched)
    after = learned(tiny_train(tmp_path / "run", model=base, **settings).model)
    for name, factor in ((".lora_B.", 7.0), ("qstar_mixing_head.output", 3.0)):
        moved = [float((after[key] - x).abs().max()) for key, x in before.items() if name in key]
        assert max(moved) == pytest.approx(factor * 1e-4, rel=1e-2), name


def test_adapters_go_on_learning_in_another_run(tmp_path):
    base = base_folder(tmp_path / "base")
    first = tiny_train(tmp_path / "first", model=base, **LORA)
    begun = {name: x.clone() for name, x in learned(first.model).items()}
    still = tiny_train(tmp_path / "still", model=str(tmp_path / "first"), learning_rate=0.0)
    assert {name: x.tolist() for name, x in learned(still.model).items()} == {n: x.tolist() for n, x in begun.items()}
    second = tiny_train(tmp_path / "second", model=str(tmp_path / "first"), learning_rate=1e-4, lora_lr_factor=20.0)
    moved = [name for name, x in learned(second.model).items() if not torch.equal(x, begun[name])]
    assert set(moved) == begun.keys()
    assert sha256(load(tmp_path / "second")[0]) == sha256(second.model)
    with pytest.raises(ValueError, match="has adapters already, which go on learning: leave lora out"):
        tiny_train(tmp_path / "third", model=str(tmp_path / "first"), **LORA)


def test_a_model_that_thinks_is_a_base_as_well(tmp_path):
    """Its mixing head goes on from where it was, and so do the thought embeddings."""
    base_folder(tmp_path / "base")
    tiny_train(tmp_path / "thinks", model=str(tmp_path / "base"), learning_rate=1e-3)
    result = tiny_train(tmp_path / "run", model=str(tmp_path / "thinks"), lora=True, learning_rate=0.0)
    was, now = load(tmp_path / "thinks")[0].state_dict(), load(tmp_path / "run")[0].state_dict()
    for name, tensor in was.items():
        found = now.get(name, now.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(found, tensor), name
    assert sha256(load(tmp_path / "run")[0]) == sha256(result.model)


def test_a_config_of_pefts_own_says_what_learns(tmp_path):
    """Also one with DoRA's magnitudes, and other ranks for some layers; the file of settings tells it."""
    base = base_folder(tmp_path / "base")
    config = LoraConfig(
        r=2, lora_alpha=5, use_dora=True, rank_pattern={"v_proj": 4}, target_modules=["q_proj", "v_proj"]
    )
    result = tiny_train(tmp_path / "run", model=base, lora=config, learning_rate=1e-3)
    shapes = {name: tuple(x.shape) for name, x in learned(result.model).items() if "layers.1." in name}
    assert shapes == {
        "model.layers.1.self_attn.q_proj.lora_A.default.weight": (2, 32),
        "model.layers.1.self_attn.q_proj.lora_B.default.weight": (32, 2),
        "model.layers.1.self_attn.q_proj.lora_magnitude_vector.default.weight": (32,),
        "model.layers.1.self_attn.v_proj.lora_A.default.weight": (4, 32),
        "model.layers.1.self_attn.v_proj.lora_B.default.weight": (16, 4),
        "model.layers.1.self_attn.v_proj.lora_magnitude_vector.default.weight": (16,),
    }
    written = json.loads((tmp_path / "run" / "training_args.json").read_text())["lora"]
    assert (written["r"], written["use_dora"], written["target_modules"]) == (2, True, ["q_proj", "v_proj"])
    before = says(result.model)
    loaded, _ = load(tmp_path / "run")
    assert sha256(loaded) == sha256(result.model)
    after = says(merge_adapters(loaded))
    assert relative_error(after["logits"], before["logits"]) < 1e-6
    assert torch.equal(after["thoughts"], before["thoughts"])


def test_targets_and_scale_are_settings(tmp_path):
    base = base_folder(tmp_path / "base")
    result = tiny_train(tmp_path / "run", model=base, lora=True, lora_rank=2, lora_alpha=6.0, lora_targets=["up_proj"])
    layers = {name for name, module in result.model.named_modules() if hasattr(module, "lora_A")}
    assert layers == {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert result.model.get_submodule("model.layers.0.mlp.up_proj").scaling == {"default": 3.0}


def test_evaluation_and_generation_think_with_adapters(tmp_path):
    """As the merged model does."""
    base = base_folder(tmp_path / "base")
    result = tiny_train(tmp_path / "run", model=base, **LORA)
    merged, tokenizer = load(tmp_path / "run")
    merge_adapters(merged)
    found = [evaluate(model, tokenizer, texts(3), seq_length=12).summary() for model in (result.model, merged)]
    gains = [each.pop("gain") for each in found]  # a small difference
    assert gains[0] == pytest.approx(gains[1], abs=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    said = [
        model.eval().generate(tiny.text(2, 5), max_new_tokens=6, do_sample=False) for model in (result.model, merged)
    ]
    assert said[0].tolist() == said[1].tolist()
    assert load(tmp_path / "run")[0].generation_config.suppress_tokens == result.model.generation_config.suppress_tokens


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(lora=True, lora_rank=0), "lora_rank is 0, but it must be an integer of at least 1"),
        (dict(lora=True, lora_rank=True), "lora_rank is True, but it must be an integer"),
        (dict(lora=True, lora_alpha="much"), "lora_alpha is 'much', but it must be a number"),
        (dict(lora=True, lora_targets=[]), "lora_targets is empty, but it must name layers"),
        (dict(lora_rank=4), "lora_rank is 4, but lora is False: lora_rank would be ignored"),
        (dict(lora_lr_factor=2.0), "lora_lr_factor is 2.0, but the model has no adapters"),
        (
            dict(lora=LoraConfig(), lora_alpha=4.0),
            "lora_alpha is 4.0, but lora is a config of its own",
        ),
        (dict(lora=True, lora_targets=["c_attn"]), "lora is for {'c_attn'}, but LlamaForCausalLM has no such layer"),
    ],
)
def test_a_setting_that_is_wrong_or_would_be_ignored_is_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        tiny_train(tmp_path / "run", model=base_folder(tmp_path / "base"), **settings)


def test_what_is_no_config_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"lora is 'yes', but it must be True, False or a peft\.LoraConfig"):
        tiny_train(tmp_path / "run", model=base_folder(tmp_path / "base"), lora="yes")


def test_a_rate_for_adapters_of_a_config_of_its_own_is_taken():
    assert QuietStarArguments("run", lora=LoraConfig(r=2), lora_lr_factor=3.0).lora_config().r == 2


def test_a_run_that_could_not_be_found_again_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(QuietStarTrainer, "train", lambda *_, **__: pytest.fail("it has begun to train"))
    with pytest.raises(ValueError, match="the model has no name by which adapters could find it again"):
        tiny_train(tmp_path / "run", lora=True)
    model = AutoModelForCausalLM.from_pretrained(base_folder(tmp_path / "base"))
    model.resize_token_embeddings(37)
    with pytest.raises(ValueError, match="whose vocabulary has 30 rows, but that of the model had 37: save it"):
        tiny_train(tmp_path / "run", model=model, lora=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.norm\.weight learns beside adapters, but a folder of adapters"):
        tiny_train(tmp_path / "run", model=model)
    (tmp_path / "base" / "config.json").unlink()
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"the adapters' base is named .*base', but it could not be found again"):
        tiny_train(tmp_path / "run", model=model)


def test_a_run_is_resumed_as_it_began(tmp_path):
    base = base_folder(tmp_path / "base")
    tiny_train(tmp_path / "adapters", model=base, **LORA, **SAVED)
    tiny_train(tmp_path / "whole", model=base, **SAVED)
    more = SAVED | dict(max_steps=5, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="holds adapters, but this run trains a whole model: give the setting lora"):
        tiny_train(tmp_path / "adapters", model=base, **more)
    with pytest.raises(ValueError, match="holds a whole model, but this run trains adapters: give the setting lora"):
        tiny_train(tmp_path / "whole", model=base, **LORA, **more)
    with pytest.raises(ValueError, match=r"lora_A\.weight is \(3, .*\), but the model's is \(5, "):
        tiny_train(tmp_path / "adapters", model=base, **(LORA | dict(lora_rank=5)), **more)
