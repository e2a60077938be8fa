"""Training in which each process holds a part of the weights: how the parts become whole, and the whole parts again.

FSDP2 makes of every parameter a ``DTensor``. Checkpoints hold whole tensors, so that any number of processes, sharded
or not, can go on from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM

from qstar.model import QuietStarModel
from qstar.wrapping import attach


def whole(state: Any, *, keep: bool) -> Any:
    """``state``, dictionaries and lists of values in one another, with every ``DTensor`` gathered on the CPU.

    All processes must call this together; those with ``keep=False`` get empty tensors in the place of gathered ones.
    """
    if isinstance(state, DTensor):
        gathered = cast(DTensor, state.detach()).full_tensor()
        return gathered.cpu() if keep else gathered.new_empty(0)
    if isinstance(state, dict):
        return {name: whole(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep=keep) for value in state]
    return state


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole ``tensor``, sharded as ``like``; all of it where that is no ``DTensor``."""
    if not isinstance(like, DTensor):
        return tensor
    own = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(own, like.device_mesh, like.placements, src_data_rank=None)  # every process has read it


def keep_losses_exact(accelerator: Accelerator) -> None:
    """Let FSDP round no more than weights to 16 bits: by default it would losses and sums of gradients as well."""
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def load_parts(model: QuietStarModel, folder: str | Path) -> None:
    """Take this process's part of the weights in ``folder``; read whole, on the CPU."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
    saved = attach(plain, model.qstar)
    saved.load_thoughts(folder)
    read = saved.state_dict()
    model.load_state_dict({name: part(read[name], like) for name, like in model.state_dict().items()})


def whole_state(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """``optimizer.state_dict()``, its tensors gathered as by :func:`whole`.

    Raises:
        ValueError: a tensor of it is a process's own, neither sharded nor shaped like its parameter.
    """
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            own = isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.numel() > 1
            if own and not (isinstance(value, DTensor) and value.shape == parameter.shape):
                raise ValueError(
                    f"optim keeps a state {name!r} that is not sharded as its parameter is, and could not be saved "
                    "whole: choose another optim, or save_strategy='no'"
                )
    return cast(dict[str, Any], whole(optimizer.state_dict(), keep=keep))


def optimizer_parts(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What :func:`whole_state` made of an ``optimizer``'s state, each tensor sharded as the parameter that it is of."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    spread = {}
    for number, values in state["state"].items():
        of = parameters[number]
        spread[number] = {
            name: part(value, of) if isinstance(value, Tensor) and value.shape == of.shape else value
            for name, value in values.items()
        }
    return state | {"state": spread}


def in_step(batches: Iterable[dict[str, Tensor]], accelerator: Accelerator) -> Iterator[dict[str, Tensor]]:
    """``batches``, and then texts of one token, which predict nothing, as long as another process has batches.

    Every pass of a sharded model takes all processes.
    """
    own = iter(batches)
    while True:
        batch = next(own, None)
        if not accelerator.reduce(torch.tensor(int(batch is not None), device=accelerator.device)):
            return
        yield dict(input_ids=torch.zeros(1, 1, dtype=torch.int64)) if batch is None else batch
