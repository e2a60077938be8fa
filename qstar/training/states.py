"""The state of a run beside its weights, in JSON and safetensors: nothing is pickled, and nothing unpickled."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TAGS = ("tensor", "tuple", "pairs")


def write_state(state: Any, path: Path) -> None:
    """Write what ``state_dict()`` of an optimizer or scheduler gives to ``path``.json, tensors to ``path``.safetensors.

    Args:
        state: dictionaries, lists, tuples, tensors, numbers, strings, True, False and None, in one another.
        path: the name of both files, without their endings.

    Raises:
        TypeError: the state holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(state, tensors, path.name))
    path.with_suffix(".json").write_text(text + "\n")
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))


def read_state(path: Path) -> Any:
    """What :func:`write_state` wrote, bit for bit; its tensors on the CPU."""
    tree = json.loads(path.with_suffix(".json").read_text())
    if not path.with_suffix(".safetensors").is_file():
        return _decoded(tree, None)
    with safe_open(path.with_suffix(".safetensors"), "pt") as tensors:
        return _decoded(tree, tensors)


def _encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """``value`` as JSON; what JSON lacks as a dictionary with one of ``TAGS``. Puts tensors into ``tensors``."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (Tensor, torch.nn.Parameter) and not value.is_quantized:
        name = str(len(tensors))
        stored = value.detach().cpu().contiguous()
        if any(stored.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in tensors.values()):
            stored = stored.clone()  # a file of safetensors holds every tensor by itself
        tensors[name] = stored
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [(_encoded(k, tensors, where), _encoded(v, tensors, f"{where}[{k!r}]")) for k, v in value.items()]
        if all(isinstance(key, str) and key not in TAGS for key in value):
            return dict(pairs)
        return {"pairs": pairs}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which no checkpoint can hold: it holds numbers, text and plain tensors, "
        "so that nothing need be unpickled; choose another optim, or save_strategy='no'"
    )


def _decoded(tree: Any, tensors: Any) -> Any:
    if isinstance(tree, list):
        return [_decoded(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    match tree:
        case {"tensor": name}:
            return tensors.get_tensor(name).clone()  # which is otherwise a view of the file
        case {"tuple": items}:
            return tuple(_decoded(item, tensors) for item in items)
        case {"pairs": pairs}:
            return {_decoded(key, tensors): _decoded(value, tensors) for key, value in pairs}
    return {key: _decoded(value, tensors) for key, value in tree.items()}


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random numbers of Python, numpy and torch are, and those of ``device`` where it is no CPU."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "cpu": torch.random.get_rng_state(),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on with the random numbers where :func:`random_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])
