"""Adapters: small matrices beside the frozen ones of a decoder (LoRA, arXiv 2106.09685), by the package peft.

They are put into a model in place, as transformers' ``model.add_adapter`` does it, and lie on the disk in peft's own
format. peft is imported only where a model has adapters or is given some.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME

if TYPE_CHECKING:
    from peft import LoraConfig

SAMPLES_FILE = "qstar/base_samples.safetensors"
SAMPLED = 8  # weights of each tensor of the base, by which it is known again
ALL_LINEAR = "all-linear"  # peft's own word
IN_PEFT = "base_model.model."  # before the names of weights in peft's files
CHOSEN = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    "target_parameters",  # which peft makes of the names of experts' layers
    *("init_lora_weights", "runtime_config", "inference_mode"),
    *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
)  # fields of LoraConfig that may be anything
STARTS = (True, False, "gaussian", "orthogonal")  # of init_lora_weights: those that leave the base's weights alone


def peft() -> Any:
    """The package peft.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ValueError(
            f"adapters (LoRA) need the package peft, but {error.name} is not installed: pip install peft"
        ) from error
    return peft


def has_adapters(model: nn.Module) -> bool:
    """Whether there are adapters in ``model``."""
    return bool(getattr(model, "peft_config", None))


def holds_adapters(folder: str | Path) -> bool:
    """Whether ``folder`` is one of adapters, and not of a whole model."""
    return (Path(folder) / ADAPTER_CONFIG_NAME).is_file()


def linear_layers(model: PreTrainedModel) -> list[str]:
    """The names of the linear layers in the decoder's layers, without its embeddings and the output head."""
    decoder = model.get_decoder()
    return [
        name
        for name, module in named_in(model, decoder)
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", name)
    ]


def named_in(model: nn.Module, part: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of ``part``, by their names in ``model``."""
    inside = set(part.modules())
    return [(name, module) for name, module in model.named_modules() if module in inside]


def resolved(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """``config``, checked for ``model``, and with the layers that it is for where it names none or all of them.

    Raises:
        TypeError: it is no ``LoraConfig``.
        ValueError: it asks for what would be ignored, or would make a thought another model's.
    """
    check_is_config(config)
    config = copy.deepcopy(config)
    check_fields(config)
    if config.target_modules == ALL_LINEAR or not (config.target_modules or config.target_parameters):
        layers = linear_layers(model)
        config.target_modules = sorted({name.rpartition(".")[2] for name in layers})
        config.exclude_modules = excluded(model, config, set(layers))
    check_targets(model, config)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in targets(model, config).values())
    return config


def check_is_config(config: Any) -> None:
    """Raise TypeError unless ``config`` is a ``peft.LoraConfig``."""
    if not isinstance(config, peft().LoraConfig):
        raise TypeError(f"lora is {config!r}, but it must be True, False or a peft.LoraConfig")


def excluded(model: PreTrainedModel, config: LoraConfig, layers: set[str]) -> list[str] | str | None:
    """The layers that ``config`` leaves out, with those outside of ``layers`` that are called as one inside."""
    others = [name for name in targets(model, config) if name not in layers]
    before = config.exclude_modules
    if isinstance(before, str):
        return "|".join([before, *map(re.escape, others)])
    return [*(before or ()), *others] or None


def targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that ``config`` is for, or whose parameters it is for, by their names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    found = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    for name, _ in model.named_parameters():
        if any(f".{name}".endswith(f".{key}") for key in config.target_parameters or ()):
            inside = name.rpartition(".")[0]
            found[inside] = model.get_submodule(inside)
    return found


def check_fields(config: LoraConfig) -> None:
    """Raise ValueError for a field that would be ignored, or would make a thought another model's."""
    usual = type(config)()
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name not in CHOSEN and value != getattr(usual, each.name):
            why = {
                "lora_dropout": "a thought must be scored by the model that sampled it",
                "modules_to_save": "the mixing head and the thought embeddings learn beside adapters, and nothing else",
                "trainable_token_indices": "the thought embeddings learn by themselves, and no other token does",
            }.get(each.name, "nobody has tried it with thoughts")
            raise ValueError(
                f"lora has {each.name} = {value!r}, but it must be left at {getattr(usual, each.name)!r}: {why}"
            )
    if config.init_lora_weights not in STARTS:
        raise ValueError(
            f"lora has init_lora_weights = {config.init_lora_weights!r}, but it must be one of {STARTS}: others change "
            "the weights of the base, which the adapters must find again"
        )


def check_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Raise ValueError where ``config`` is for what must not have adapters, or for nothing."""
    found = targets(model, config)
    if not found and not config.target_parameters:  # which peft calls otherwise once they have adapters
        raise ValueError(f"lora is for {config.target_modules!r}, but {type(model).__name__} has no such layer")
    base = dict(named_in(model, model.base_model))
    for name, module in found.items():
        if module is model.get_input_embeddings() or name not in base:
            raise ValueError(
                f"lora is for {name}, but adapters must be of layers inside the decoder: embeddings, mixing head and "
                "output head are read by their weights, which would pass an adapter by"
            )


def check_adapters(model: PreTrainedModel) -> None:
    """Raise ValueError for adapters in ``model`` with which it could not learn to think, or not be saved.

    That is where there are several, they are no LoRA, are merged or disabled, or are where none must be.
    """
    if not has_adapters(model):
        return
    if len(model.peft_config) != 1:
        raise ValueError(
            f"the model has {len(model.peft_config)} adapters, {', '.join(model.peft_config)}, but it must have one: "
            "model.delete_adapter(name) removes one"
        )
    [(name, config)] = model.peft_config.items()
    if not isinstance(config, peft().LoraConfig):
        raise ValueError(
            f"the model has adapters by a {type(config).__name__}, but only those of a LoraConfig can learn to think"
        )
    check_fields(without_dropout(config))
    check_targets(model, config)
    for path, layer in lora_layers(model).items():
        if layer.merged or layer.disable_adapters or layer.active_adapters != [name]:
            raise ValueError(
                f"the model's adapters are merged, disabled or not active in {path}: unmerge and enable them, or merge "
                "them for good (merge_and_unload() of peft)"
            )


def adopt(model: PreTrainedModel) -> None:
    """Take the adapters in ``model`` for its own, without dropout, also where peft has put them there by itself."""
    model.peft_config = {name: without_dropout(config) for name, config in model.peft_config.items()}
    model._hf_peft_config_loaded = True


def without_dropout(config: Any) -> Any:
    """``config`` as it is where every noise is set to 0."""
    config = copy.copy(config)
    config.lora_dropout = 0.0
    return config


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by their names."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def base_of(model: PreTrainedModel) -> tuple[str, str | None]:
    """Where the base of ``model`` is found again: a hub name and its revision, or a folder.

    Raises:
        ValueError: the model does not know.
    """
    name = model.name_or_path
    if not name:
        raise ValueError(
            "the model has no name by which adapters could find it again: save it, and begin with its folder"
        )
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    return name, getattr(model.config, "_commit_hash", None)


def check_folder(model: PreTrainedModel, folder: Path) -> None:
    """Raise ValueError where ``model`` would lie in ``folder`` beside what is loaded in its place, or with it.

    So it is with adapters whose base could not be found again.
    """
    if has_adapters(model) and (folder / CONFIG_NAME).exists():
        raise ValueError(f"{folder} holds a whole model, and the adapters of this one would be taken for its own")
    if has_adapters(model):
        base_of(model)
    if not has_adapters(model) and holds_adapters(folder):
        raise ValueError(f"{folder} holds adapters, which would be added to this model when it is loaded")


def stored_base(folder: str | Path) -> tuple[str, str | None]:
    """The base that the adapters in ``folder`` are for, as :func:`base_of` has named it.

    Raises:
        ValueError: they name none.
    """
    config = json.loads((Path(folder) / ADAPTER_CONFIG_NAME).read_text())
    name = config.get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{folder} holds adapters, but its {ADAPTER_CONFIG_NAME} names no base_model_name_or_path")
    return name, config.get("revision")


def stored_config(folder: str | Path) -> LoraConfig:
    """The settings of the adapters in ``folder``, which are to learn on."""
    config = peft().PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def adapter_weights(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the adapters, out of the state of the whole model, by their names in peft's files."""
    [name] = model.peft_config
    weights = peft().get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    return {f"{IN_PEFT}{key}": tensor for key, tensor in weights.items()}


def save_adapters(model: PreTrainedModel, folder: Path, state: dict[str, Tensor]) -> None:
    """Write the adapters of ``model``, whose state is ``state``, to ``folder`` as peft does."""
    weights = {name: tensor.contiguous() for name, tensor in adapter_weights(model, state).items()}
    save_file(weights, folder / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    config: Any = copy.deepcopy(next(iter(model.peft_config.values())))
    config.inference_mode = True  # as peft writes it
    config.base_model_name_or_path, config.revision = base_of(model)
    config.save_pretrained(str(folder))
    (folder / SAMPLES_FILE).parent.mkdir(exist_ok=True)
    save_file(samples(model), folder / SAMPLES_FILE)


def samples(model: nn.Module) -> dict[str, Tensor]:
    """The first weights of each tensor but the adapters', and but for quantised ones, by its name in the base."""
    return {
        name.replace(".base_layer.", "."): parameter.detach().flatten()[:SAMPLED].clone()
        for name, parameter in model.named_parameters()
        if ".lora_" not in name and parameter.is_floating_point()
    }


def check_base(base: PreTrainedModel, folder: str | Path) -> None:
    """Raise ValueError where ``base`` has other weights than the one that the adapters in ``folder`` learned beside."""
    found = samples(base)
    for name, stored in load_file(Path(folder) / SAMPLES_FILE).items():
        if name not in found:
            continue  # the thoughts' own, or quantised here
        coarse = min(stored.dtype, found[name].dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(stored.to(coarse), found[name].to("cpu", coarse)):
            raise ValueError(
                f"{folder} holds adapters of {base.name_or_path}, but its {name} is not what it was beside them: the "
                "base is another"
            )


def load_adapters(model: PreTrainedModel, folder: str | Path) -> None:
    """Take the weights of the adapters in ``folder`` into those of ``model``.

    Raises:
        ValueError: they are of other layers, or of another rank.
    """
    stored = load_file(Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME)
    mine = adapter_weights(model, model.state_dict())
    for name in sorted(stored.keys() | mine.keys()):
        found, wanted = (tuple(each[name].shape) if name in each else None for each in (stored, mine))
        if found != wanted:
            raise ValueError(f"{folder} holds adapters whose {name} is {found}, but the model's is {wanted}")
    [adapter] = model.peft_config
    peft().set_peft_model_state_dict(model, stored, adapter)


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters of ``model`` to the weights beside them, in place; it is then an ordinary model, which learns.

    Args:
        model: one with adapters.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: it has no adapters, or such as :func:`check_adapters` refuses; its weights are quantised, where a
            sum would be rounded; a sum is not finite.
    """
    if not has_adapters(model):
        raise ValueError("the model has no adapters that could be merged")
    check_adapters(model)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            "the model's weights are quantised, and adapters added to them would be rounded: load the base in full "
            "precision, and merge into that"
        )
    for name, layer in reversed(lora_layers(model).items()):  # of two around the same experts, the inner one first
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.name_or_path = ""  # no folder holds it yet
    return model.requires_grad_(True)
