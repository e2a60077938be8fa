"""What several processes cannot share is refused with the reason, before a model is read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType
from peft import LoraConfig
from tiny_runs import QUIET, tiny_train, unequal_rows
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from qstar.training.parallelism import check_running, reading_whole
from qstar.training.saving import CheckpointTrainer
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer
from qstar.wrapping import wrap

NAMES = {"tp_size": "TP_SIZE", "cp_size": "CP_SIZE", "sp_size": "SP_SIZE"}


@pytest.mark.parametrize("launched", [False, True], ids=["argument", "accelerate-launch"])
@pytest.mark.parametrize("size", NAMES)
def test_a_grid_that_is_split_is_refused(size, launched, tmp_path, monkeypatch):
    """Tensor, context and sequence parallelism, however they are asked for."""
    settings = {}
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
        monkeypatch.setenv(f"PARALLELISM_CONFIG_{NAMES[size]}", "2")
    else:
        settings["parallelism_config"] = ParallelismConfig(**{size: 2})
    with pytest.raises(ValueError, match=rf"parallelism_config.{size} is 2, but it must be 1: "):
        QuietStarArguments(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (dict(FSDP_VERSION="1"), "fsdp_version is 1, but it must be 2: "),
        ({}, "fsdp_version is 1, but it must be 2: "),
        (
            dict(FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true"),
            "fsdp_cpu_ram_efficient_loading is True, but it must be False: every process checks",
        ),
    ],
    ids=["version-1", "default-version", "one-process-reads"],
)
def test_an_accelerate_launch_with_another_fsdp_is_refused(variables, message, tmp_path, monkeypatch):
    for name, value in (variables | dict(ACCELERATE_USE_FSDP="true")).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        QuietStarArguments(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(fsdp_config={"version": 1}), "fsdp_version is 1, but it must be 2: "),
        (dict(fsdp_config={"cpu_ram_efficient_loading": True}), "fsdp_cpu_ram_efficient_loading is True"),
        (dict(save_on_each_node=True), "save_on_each_node is True, but with FSDP it must be False"),
    ],
    ids=["version-1", "one-process-reads", "every-node-saves"],
)
@pytest.mark.filterwarnings("ignore:FSDP1:FutureWarning")
def test_settings_of_another_fsdp_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        QuietStarArguments(str(tmp_path), fsdp=True, **settings)


def test_a_run_that_would_quietly_not_be_sharded_is_refused(tmp_path, monkeypatch):
    """accelerate takes a whole model in every process where it finds no GPUs."""
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    args = QuietStarArguments(str(tmp_path), use_cpu=True, **QUIET)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is asked for, but accelerate would run NO, with a whole model in every"):
        QuietStarTrainer(model, args, train_dataset=unequal_rows())


@pytest.mark.parametrize(
    ("variable", "running", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.MULTI_CPU, "DEEPSPEED is asked for, but .* would run MULTI_CPU"),
        ("ACCELERATE_USE_MEGATRON_LM", DistributedType.MEGATRON_LM, "Megatron-LM is asked for, but it replaces"),
    ],
)
def test_what_runs_must_be_ours_and_what_was_asked_for(variable, running, message, tmp_path, monkeypatch):
    args = QuietStarArguments(str(tmp_path))
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=message):
        check_running(args, SimpleNamespace(distributed_type=running), None)


def test_a_head_that_is_the_embedding_is_refused_with_zero_3(tmp_path):
    args = QuietStarArguments(str(tmp_path))
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3))
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED, state=state)
    check_running(args, accelerator, tiny.plain_model("llama"))
    with pytest.raises(ValueError, match="zero_stage is 3, but for GPT2LMHeadModel, whose head is its embedding"):
        check_running(args, accelerator, tiny.plain_model("gpt2"))


def test_layers_that_lie_in_several_processes_are_refused(tmp_path):
    args, running = QuietStarArguments(str(tmp_path)), SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match="the model's layers lie in 2 processes each, but: "):
        check_running(args, running, tiny.plain_model("llama"), tensor_parallel=2)


class OfZeRO3:
    """DeepSpeed's configuration, to transformers."""

    def is_zero3(self) -> bool:
        return True


def test_a_model_is_read_whole_for_zero_3(tmp_path):
    """DeepSpeed would divide it at once, and nothing could be checked."""
    args = QuietStarArguments(str(tmp_path))
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    args.hf_deepspeed_config = OfZeRO3()
    deepspeed.set_hf_deepspeed_config(args.hf_deepspeed_config)
    try:
        with reading_whole(args):
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_a_model_that_is_divided_already_is_refused(tmp_path):
    model = tiny.plain_model("llama")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model)
        with pytest.raises(ValueError, match="LlamaForCausalLM has its weights divided among processes"):
            wrap(model, tiny.tokenizer())
    finally:
        distributed.destroy_process_group()


def test_what_sharded_weights_cannot_do_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointTrainer, "is_sharded", property(lambda trainer: True))
    tiny.plain_model("llama").save_pretrained(tmp_path / "base")
    adapted = wrap(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny.tokenizer())
    adapted.add_adapter(LoraConfig())
    with pytest.raises(ValueError, match="lora is set, but with FSDP or DeepSpeed it must not be: DDP trains adapters"):
        tiny_train(tmp_path / "lora", model=adapted)


class OfDeepSpeed(QuietStarTrainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


def test_deepspeed_reads_grids_at_once(tmp_path):
    options = dict(use_cpu=True, report_to="none", save_strategy="no")
    args = QuietStarArguments(str(tmp_path), **options, max_grid_tokens=64)
    with pytest.raises(ValueError, match="max_grid_tokens is 64, but with DeepSpeed it must be 0"):
        OfDeepSpeed(tiny.thinking_model(), args, train_dataset=unequal_rows())
    args = QuietStarArguments(str(tmp_path), **options)
    trainer = OfDeepSpeed(tiny.thinking_model(), args, train_dataset=unequal_rows())
    assert trainer.objective.max_grid_tokens is None and args.objective().max_grid_tokens == 4096


def test_deepspeed_takes_no_stages(tmp_path):
    options = dict(use_cpu=True, report_to="none", save_strategy="no", stages=[dict(steps=1)])
    with pytest.raises(ValueError, match="stages is set, but with DeepSpeed it must not be"):
        OfDeepSpeed(tiny.thinking_model(), QuietStarArguments(str(tmp_path), **options), train_dataset=unequal_rows())
