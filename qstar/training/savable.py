"""What cannot be saved is refused before it is trained."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qstar.adapters import adapter_weights, base_of, check_adapters, has_adapters
from qstar.model import PREFIX, QuietStarModel


def check_savable(model: QuietStarModel, folder: Path) -> None:
    """Raise where what a run ends with could not be written, or not be read again.

    Args:
        model: the model that is to be trained.
        folder: where it will be saved; made here.

    Raises:
        ValueError: the model's weights or settings cannot be written by transformers, or its folder would be loaded as
            another class; the base of adapters would not be found again, or something learns beside them that their
            folder would not hold.
        OSError: the folder cannot be written to, or its disk has no room for the model.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if has_adapters(model):
        check_adapters(model)
        _check_base(model)
        _check_learned(model)
    elif quantizer is not None and not quantizer.is_serializable():
        raise ValueError(
            f"the model was loaded by {type(quantizer).__name__}, whose weights transformers does not save: copy them "
            "into a plain model of the same configuration first"
        )
    base = type(model).__bases__[-1]  # see qstar.classes
    _check_loaded_as(model, base)
    if model.generation_config is not None:
        with tempfile.TemporaryDirectory() as trial:
            try:
                model.generation_config.save_pretrained(trial)
            except ValueError as error:
                raise ValueError(f"model.generation_config could not be saved: {error}") from error
    make_folder(folder)
    _check_room(folder, saved_bytes(model))


def saved_bytes(model: QuietStarModel) -> int:
    """What the weights of ``model`` take on the disk, those of its base left out where it has adapters."""
    state = model.state_dict()
    saved = list(adapter_weights(model, state).values()) if has_adapters(model) else list(state.values())
    if has_adapters(model):
        saved += [tensor for name, tensor in state.items() if name.startswith(PREFIX)]
    return sum({x.data_ptr(): x.nbytes for x in saved}.values())  # tied ones once


def _check_base(model: QuietStarModel) -> None:
    name, revision = base_of(model)
    at = {} if revision is None else {"revision": revision}
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **at).get_text_config(decoder=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"the adapters' base is named {name!r}, but it could not be found again: {error}") from error
    if config.vocab_size != model.qstar_base_vocabulary:
        raise ValueError(
            f"the adapters' base is named {name!r}, whose vocabulary has {config.vocab_size} rows, but that of the "
            f"model had {model.qstar_base_vocabulary}: save it as it is, and begin with that folder"
        )


def _check_learned(model: QuietStarModel) -> None:
    saved = {x.data_ptr() for x in adapter_weights(model, model.state_dict()).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in saved and not name.startswith(PREFIX):
            raise ValueError(
                f"{name} learns beside adapters, but a folder of adapters would not hold it: freeze it by "
                "requires_grad_(False)"
            )


def _check_loaded_as(model: PreTrainedModel, base: type) -> None:
    found = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    classes = found if isinstance(found, tuple) else (found,)
    if base not in classes:
        names = ", ".join(each.__name__ for each in classes if each is not None) or "no class"
        raise ValueError(
            f"the model is a {base.__name__}, but AutoModelForCausalLM would load its folder as {names}: it could not "
            "be opened again"
        )


def make_folder(folder: Path) -> None:
    """Make ``folder`` where it is missing.

    Raises:
        OSError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir is {str(folder)!r}, but it cannot be written to: {error.strerror or error}"
        ) from error


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"output_dir is {str(folder)!r}, but its disk has {free / 2**30:.2f} GiB, and the model takes "
            f"{size / 2**30:.2f} GiB"
        )
