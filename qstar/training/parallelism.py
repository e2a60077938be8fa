"""How several processes may share the work of training, and what is refused, with the reason."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import deepspeed

_ONE_TEXT = "a thought grid must lie in one process: its tokens see each other by their place in it"
REFUSED_SIZES = {
    "tp_size": "thoughts are read by layers and drawn from a head that are whole in every process",
    "cp_size": _ONE_TEXT,
    "sp_size": _ONE_TEXT,
}  # of accelerate's ParallelismConfig


def check_launch(args: TrainingArguments) -> None:
    """Refuse, before a model is read, what ``args`` or ``accelerate launch`` ask for and training cannot do.

    Raises:
        ValueError: tensor, context or sequence parallelism; FSDP of version 1; weights that one process alone reads;
            files that every node saves.
    """
    config = args.parallelism_config
    if config is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        config = ParallelismConfig()
    for name, why in REFUSED_SIZES.items():
        size = getattr(config, name, None) or 1
        if size > 1:
            raise ValueError(f"parallelism_config.{name} is {size}, but it must be 1: {why}")
    if not is_fsdp_asked_for(args):
        return
    plugin = args.fsdp_plugin_args or {}
    version = int(plugin.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise ValueError(
            f"fsdp_version is {version}, but it must be 2: the first makes one flat tensor of several weights, of "
            "which none can be read alone"
        )
    if plugin.get("cpu_ram_efficient_loading", parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING")):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is True, but it must be False: every process checks that the model thinks, "
            "for which it needs the weights"
        )
    if args.save_on_each_node:
        raise ValueError("save_on_each_node is True, but with FSDP it must be False: one process has the whole model")


@contextlib.contextmanager
def reading_whole(args: TrainingArguments) -> Iterator[None]:
    """Read a model whole, which DeepSpeed's ZeRO-3 would divide while it is read: it is divided before the first step.

    A model is checked before that, outside of the forward in which its weights would be gathered.
    """
    if not deepspeed.is_deepspeed_zero3_enabled():
        yield
        return
    plugin: Any = args.deepspeed_plugin
    config = args.hf_deepspeed_config if args.deepspeed else plugin.dschf
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(config)


def check_running(
    args: TrainingArguments, accelerator: Accelerator, model: PreTrainedModel, tensor_parallel: int = 1
) -> None:
    """Refuse a run that is not the one that was asked for.

    Raises:
        ValueError: FSDP or DeepSpeed are asked for, and accelerate has quietly done without; or a strategy that is
            not ours runs; ``tensor_parallel`` is not 1, in however many processes a layer lies; ZeRO-3 is to divide a
            model whose head is its embedding.
    """
    if tensor_parallel > 1:
        raise ValueError(f"the model's layers lie in {tensor_parallel} processes each, but: {REFUSED_SIZES['tp_size']}")
    running = accelerator.distributed_type
    for asked, kind in (
        (is_fsdp_asked_for(args), DistributedType.FSDP),
        (bool(args.deepspeed) or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"), DistributedType.DEEPSPEED),
    ):
        if asked and running != kind:
            raise ValueError(
                f"{kind.value} is asked for, but accelerate would run {running.value}, with a whole model in every "
                "process: it takes several processes, and for FSDP GPUs"
            )
    if running == DistributedType.MEGATRON_LM:
        raise ValueError("Megatron-LM is asked for, but it replaces the model by one of its own, which cannot think")
    divided = running == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3
    if divided and model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        raise ValueError(
            f"DeepSpeed's zero_stage is 3, but for {type(model).__name__}, whose head is its embedding, it must be at "
            "most 2: it lets go of an embedding whenever tokens have been read; FSDP2 does not"
        )


def is_fsdp_asked_for(args: TrainingArguments) -> bool:
    """Whether ``args`` or ``accelerate launch`` ask for FSDP."""
    return bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP")
