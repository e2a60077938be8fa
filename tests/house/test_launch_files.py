"""The files for ``accelerate launch`` in configs/ say to accelerate what our documentation says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp.fully_sharded_data_parallel import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from qstar.training.settings import QuietStarArguments

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def config(name: str) -> ClusterConfig:
    return ClusterConfig.from_yaml_file(ROOT / "configs" / f"{name}.yaml")


def launched(name: str) -> dict[str, str]:
    """The environment in which ``accelerate launch`` with a file starts its processes."""
    file = str(ROOT / "configs" / f"{name}.yaml")
    args = launch_command_parser().parse_args(["--config_file", file, "--num_processes", "4", "-m", "qstar", "train"])
    args, defaults, _ = _validate_launch_command(args)
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = list(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


@pytest.fixture
def launch(monkeypatch):
    """Puts a process into the environment of a launch with a file, by its name."""

    def begin(name: str) -> None:
        for variable, value in launched(name).items():
            if variable.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(variable, value)

    return begin


def test_every_file_is_tested_and_documented():
    files = {path.stem for path in (ROOT / "configs").iterdir()}
    page = (ROOT / "docs" / "several-processes.md").read_text()
    assert files == KINDS.keys()
    assert all(f"accelerate launch --config_file configs/{name}.yaml -m qstar train" in page for name in files)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_knows_every_word_of_a_file(name):
    """It raises on a word of the first level that it does not know, and is silent on deeper ones."""
    read = config(name)
    assert read.distributed_type == KINDS[name]
    known = vars(launch_command_parser().parse_args(["script"]))
    assert set(read.fsdp_config) | set(read.deepspeed_config) <= known.keys()


def test_the_file_for_fsdp_divides_a_model_by_its_layers(launch, tmp_path):
    launch("fsdp2")
    QuietStarArguments(str(tmp_path))  # which refuses what is not ours
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert not plugin.cpu_ram_efficient_loading


@pytest.mark.parametrize("stage", [2, 3])
def test_the_files_for_deepspeed_take_the_settings_of_the_run(stage, launch):
    """And ZeRO-3 gathers the weights of the model that is saved."""
    launch(f"zero{stage}")
    settings = DeepSpeedPlugin().deepspeed_config
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"
    if stage == 3:
        assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
