"""What cannot be saved is refused before it is trained."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from qstar.model import QuietStarModel


def check_savable(model: QuietStarModel, folder: Path) -> None:
    """Raise where what a run ends with could not be written, or not be read again.

    Args:
        model: the model that is to be trained.
        folder: where it will be saved; made here.

    Raises:
        ValueError: the model's weights or settings cannot be written by transformers, or its folder would be loaded as
            another class.
        OSError: the folder cannot be written to, or its disk has no room for the model.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_serializable():
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
    _check_room(folder, model.num_parameters() * model.dtype.itemsize)


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
