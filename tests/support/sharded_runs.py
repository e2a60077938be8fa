"""Training runs of a second that are sharded on a CPU, as accelerate would shard them on GPUs.

accelerate does so on GPUs only, and takes a whole model in every process on a CPU, without a word. The trainers here
tell it what it would have found on GPUs, and everything from there on is its own.
"""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from datasets import IterableDataset
from on_processes import RANKS
from tiny_runs import QUIET, unequal_rows
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import propagate_args_to_deepspeed

from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import wrap

ROWS = 4  # in an update
SIZES = dict(thought_tokens=2, ahead_tokens=2)
# Its last norm lies deeper than accelerate looks for it, so that its head is sharded alone.
HEAD_ALONE = dict(tie_word_embeddings=False, word_embed_proj_dim=32, hidden_size=32, ffn_dim=48, num_hidden_layers=2)


class Recorder(QuietStarTrainer):
    """Keeps the thoughts of every batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.thoughts: list[torch.Tensor] = []

    def compute_loss(self, *args, **kwargs):
        loss, output = super().compute_loss(*args, **kwargs | dict(return_outputs=True))
        self.thoughts.append(output.thoughts)
        return loss


class WithFSDP(Recorder):
    """Shards by accelerate's ``fsdp2_prepare_model``, each layer a unit of its own."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def training_step(self, model, *args, **kwargs):
        assert self.accelerator.is_fsdp2 and isinstance(model, FSDPModule)
        layers = [module for module in model.modules() if type(module).__name__.startswith("FSDP")]
        assert len(layers) > model.config.num_hidden_layers
        assert all(isinstance(each, DTensor) for group in self.optimizer.param_groups for each in group["params"])
        return super().training_step(model, *args, **kwargs)


class WithDeepSpeed(Recorder):
    """Shards by DeepSpeed, in ``stage`` 2 or 3, in which no weight is too small for it."""

    stage = 2

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        zero = dict(
            stage=self.stage, stage3_param_persistence_threshold=0, stage3_gather_16bit_weights_on_model_save=True
        )
        config = dict(
            zero_optimization=zero,
            gradient_clipping=self.args.max_grad_norm,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            train_micro_batch_size_per_gpu=self.args.per_device_train_batch_size,
            zero_allow_untested_optimizer=True,
        )
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        plugin.set_mixed_precision("no")
        plugin.select(_from_accelerator_state=True)
        state = self.accelerator.state
        state.deepspeed_plugins = {"default": plugin}
        state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
        self.accelerator.deepspeed_engine_wrapped = None
        self.is_deepspeed_enabled = True
        propagate_args_to_deepspeed(self.accelerator, self.args)

    def training_step(self, model, *args, **kwargs):
        assert model.zero_optimization_stage() == self.stage
        if self.stage == 3:
            assert all(parameter.ds_tensor.numel() < parameter.ds_numel for parameter in model.parameters())
        return super().training_step(model, *args, **kwargs)


class WithZeRO3(WithDeepSpeed):
    stage = 3


KINDS = {"alone": Recorder, "fsdp": WithFSDP, "zero2": WithDeepSpeed, "zero3": WithZeRO3}


def a_model(family: str):
    if family != "opt":
        return tiny.thinking_model(family, **SIZES)
    torch.manual_seed(0)
    config = transformers.OPTConfig(**tiny.FAMILIES["gpt2"][1] | HEAD_ALONE, num_attention_heads=4)
    model = wrap(tiny.randomized(transformers.OPTForCausalLM(config)).eval(), tiny.tokenizer(), **SIZES)
    with torch.no_grad():
        model.qstar_mixing_head.output.weight.normal_(0, 0.5)
    return model


def a_trainer(folder: Path, family: str, kind: str = "alone", *, streamed: bool = False, **settings) -> Recorder:
    """A trainer of updates of four unequal rows, documents packed into one of them; of two processes unless alone."""
    options = QUIET | dict(max_steps=3, warmup_steps=0, optim="sgd", learning_rate=0.1, logging_steps=1, use_cpu=True)
    options |= dict(preset="paper", policy_weight=1.0)  # signed rewards cancel: little but rounding is left
    batch = dict(per_device_train_batch_size=ROWS, train_sampling_strategy="sequential")
    if kind != "alone":
        batch |= dict(fsdp=kind == "fsdp", per_device_train_batch_size=ROWS // RANKS)
    tokenizer, model = tiny.tokenizer(), a_model(family)
    tokenizer.add_special_tokens({"additional_special_tokens": [model.qstar.start_token, model.qstar.end_token]})
    args = QuietStarArguments(str(folder), **options | batch | settings)
    rows = unequal_rows()
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else rows
    return KINDS[kind](model, args, train_dataset=dataset, eval_dataset=rows, processing_class=tokenizer)
