"""The settings of a training run: transformers' ``TrainingArguments`` and those of Quiet-STaR, each a field once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from qstar.config import setting
from qstar.data import DataSettings
from qstar.learning import BASELINES, Objective
from qstar.training.finite import POLICIES
from qstar.training.lora import LoraSettings
from qstar.training.parallelism import check_launch
from qstar.training.stages import Curriculum, read_stages
from qstar_kernels import CPU_LIBRARIES

_OURS = "the losses and the evaluation are Quiet-STaR's own, which have no use for it"
IGNORED_ARGUMENTS = {
    "label_smoothing_factor": _OURS,
    "prediction_loss_only": _OURS,
    "include_for_metrics": _OURS,
    "batch_eval_metrics": _OURS,
    "eval_accumulation_steps": _OURS,
    "eval_use_gather_object": _OURS,
    "eval_do_concat_batches": _OURS,
    "label_names": _OURS,
    "fp16_full_eval": _OURS,
    "bf16_full_eval": _OURS,
    "neftune_noise_alpha": "noise would score a thought by another model than the one that sampled it",
    "torch_compile": "passes over text and over thoughts have other shapes and layouts, on which the compiler fails",
    "use_liger_kernel": "it replaces the forward in which the model thinks",
}  # fields of TrainingArguments that would be ignored, or make a result wrong
PRESETS: dict[str, dict[str, Any]] = {  # what is left at None by name of the objective
    "paper": dict(likelihood_weight=1.0, baseline="mean", signed_advantages=False, reinforce_temperature=3.0),
    "rlp": dict(likelihood_weight=1.0, baseline="leave_one_out", signed_advantages=True, reinforce_temperature=1.0),
}
OF_PRESET = tuple(PRESETS["paper"])
UNSAVED_OPTIMIZERS = ("adamw_torch_4bit", "adamw_torch_8bit")  # their states are tensors of a class of torchao's
GRID_TOKENS = 4096  # a step of a model of 135M parameters then takes 10 GiB, and a GPU has enough to do
UNSEEN: dict[str, Any] = dict(sample_steps=0, inspect_steps=0, inspect_tokens=256)  # nobody looks at the thoughts
LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "sample_steps": 0,
    "gradient_norm_steps": 0,
    "inspect_steps": 0,
    "inspect_tokens": 2,
    "seed": 0,
}
LESS_IS_BETTER = ("loss", "nll_base", "nll_talk", "perplexity_base", "perplexity_talk")  # of what an evaluation finds
MORE_IS_BETTER = ("gain",)


def _more_is_better(metric: str) -> bool:
    """The direction of a metric, which transformers would take to be upwards for all but a loss."""
    if metric.endswith(LESS_IS_BETTER) or metric.endswith(MORE_IS_BETTER):
        return metric.endswith(MORE_IS_BETTER)
    raise ValueError(
        f"metric_for_best_model is {metric!r}, but it must end in {', '.join(LESS_IS_BETTER + MORE_IS_BETTER)}, or "
        "greater_is_better must say which is better"
    )


@dataclass(kw_only=True)
class RunSettings:
    """What ``qstar train`` takes beside the settings of thoughts and of training; see :func:`qstar.train`."""

    _argument_group_name = "run"

    model: str | None = setting(None, "Hub name or folder.")
    dataset: str | None = setting(None, "Hub name, folder, or .txt, .jsonl, .json or .parquet file.")
    eval_dataset: str | None = setting(None, "Held-out text, evaluated as --eval_strategy says, or at the end.")
    batch_size: int | None = setting(None, "Another name for --per_device_train_batch_size.")
    resume: bool = setting(False, "Go on with the last whole checkpoint in --output_dir.")


@dataclass
class QuietStarArguments(LoraSettings, DataSettings, TrainingArguments):
    """transformers' ``TrainingArguments`` and the settings of Quiet-STaR; the paper's defaults but for the reward."""

    output_dir: str | None = setting("runs/quiet-star", "Folder for the model, the metrics and the checkpoints.")
    learning_rate: float = setting(1e-6, "Learning rate of the base model.")
    weight_decay: float = setting(1e-3, "Weight decay of the base model.")
    warmup_steps: float = setting(20, "Steps over which the learning rate rises to its value.")
    per_device_train_batch_size: int = setting(8, "Rows in a batch, on each device.")
    logging_steps: float = setting(10, "Log every so many steps.")
    logging_nan_inf_filter: bool = setting(False, "Leave losses that are not finite out of the log.")
    dataloader_pin_memory: bool = setting(torch.accelerator.is_available(), "Pin batches in memory, for a GPU.")

    dataset_split: str = setting("train", "Split of a hub dataset to train on.")
    eval_config: str | None = setting(None, "Configuration of a hub dataset that is held out.")
    eval_split: str = setting("test", "Split of a hub dataset that is held out.")
    stages: list[Any] | str | None = setting(
        None,
        "A curriculum: for each stage its steps and what differs from the stage before, thought_tokens, ahead_tokens, "
        "rationales, learning_rate, and whether it is to distil the prediction with thoughts into the one without; "
        "JSON, or the name of a .json file. The schedule of the learning rate is over the steps of each stage.",
    )
    policy_weight: float = setting(
        10.0,
        "beta: weight of the REINFORCE loss. With the 1e6 of the authors' code the gradient clip throttles all else.",
    )
    preset: str = setting(
        "rlp",
        "What the settings of the objective are that are not given. paper: the rule of Quiet-STaR, advantages over the "
        "mean of the thoughts at a position, those below it left out, and log-probabilities at temperature 3. rlp: "
        "the policy gradient of RLP, advantages over the mean of the other thoughts, with their sign, and temperature "
        "1; give it at least two rationales, since a single thought is compared with no thought. RLP itself has "
        "neither likelihood nor mixing head: likelihood_weight 0, mixing_head False.",
        choices=list(PRESETS),
    )
    likelihood_weight: float | None = setting(
        None,
        "Weight of the likelihood of the text, without thoughts and with; 0 learns from the reward alone. As preset "
        "says if not given: 1.",
    )
    entropy_weight: float = setting(0.0, "Weight of a bonus for the entropy of a thought's tokens, nats; 0 for none.")
    thought_temperature: float = setting(1.0, "Thoughts are sampled at this temperature.")
    reinforce_temperature: float | None = setting(
        None,
        "Log-probabilities of sampled tokens are taken at this temperature. As preset says if not given: "
        "thought_temperature, or 3 of paper.",
    )
    baseline: str | None = setting(
        None,
        "What a thought is compared with: the mean of the thoughts at its position, that of the others, or base, no "
        "thought, which a single thought always is. As preset says if not given: leave_one_out, or mean of paper.",
        choices=list(BASELINES),
    )
    signed_advantages: bool | None = setting(
        None,
        "Learn from thoughts that did worse than the baseline as well. As preset says if not given: True, or False of "
        "paper.",
        nargs="?",
        const=True,
    )
    thought_embedding_lr_factor: float = setting(100.0, "Learning rate of start and end embeddings over learning_rate.")
    mixing_head_lr_factor: float = setting(1.0, "Learning rate of the mixing head over learning_rate.")
    max_grid_tokens: int | None = setting(
        None,
        "Tokens of the thought grid (rows times text tokens times slots) that are read at once with gradients; a "
        f"larger grid is read in parts, which takes less memory and more time. {GRID_TOKENS} if not given, but no "
        "limit with DeepSpeed; 0 for no limit.",
    )
    positions_per_row: int | None = setting(
        None,
        "Think at so many random positions of each row, others in every step, instead of at all of them: in proportion "
        "less to compute, and less to learn from.",
    )
    on_nonfinite: str = setting(
        "stop",
        "What to do about an update whose loss or gradient is not finite: stop before it, or skip it.",
        choices=list(POLICIES),
    )
    sample_steps: int = setting(
        50, "Show some thoughts every so many steps, and write a table of more into thoughts/; 0 for never."
    )
    gradient_norm_steps: int = setting(
        100, "Log both losses' gradient norms every so many steps, on one process; 0 for never."
    )
    inspect_steps: int = setting(
        0,
        "Inspect the first texts of eval_dataset every so many steps, and write pages that show their thoughts into "
        "inspections/; 0 for never.",
    )
    inspect_tokens: int = setting(UNSEEN["inspect_tokens"], "Tokens of the texts that are inspected, at most.")
    cpu_products: str = setting(
        "auto",
        "Library of float32 products on a CPU: onednn where that was measured to be faster, or always torch's own.",
        choices=list(CPU_LIBRARIES),
    )
    curves: bool = setting(True, "Draw curves of what was logged into curves.png at the end; needs matplotlib.")

    def __post_init__(self) -> None:
        if torch.backends.mps.is_available():
            self.use_cpu = True  # the sampler and the means need float64, which Apple's GPUs lack
        for name, least in LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}")
        if self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}, but it must be one of {', '.join(PRESETS)}")
        if self.preset == "rlp" and self.reinforce_temperature is None and self.thought_temperature:
            self.reinforce_temperature = self.thought_temperature  # the gradient is unbiased where both are the same
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.curriculum is not None:
            self._check_stages(self.curriculum)
        for name, least in (("max_grid_tokens", 0), ("positions_per_row", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is {value!r}, but it must be an integer of at least {least}, or None")
        for each in fields(self):
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            if each.type in (float, "float", "float | None") and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise ValueError(f"{each.name} is {value!r}, but it must be a number")
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps == 0:
            raise ValueError(
                f"max_steps is {self.max_steps!r}, but it must be an integer: the steps to train for, or -1"
            )
        if not torch.accelerator.is_available():
            if self.fp16:
                raise ValueError("fp16 is True, but there is no GPU: a CPU trains in bfloat16, bf16=True")
            self.use_cpu = True
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = _more_is_better(self.metric_for_best_model)
        super().__post_init__()
        check_launch(self)
        loading = cast(AcceleratorConfig, self.accelerator_config)
        if loading.dispatch_batches is None:
            loading.dispatch_batches = False  # else one process cuts the batches of all, which must be of one length
        defaults = {each.name: each for each in fields(TrainingArguments)}
        for name, why in IGNORED_ARGUMENTS.items():
            value = getattr(self, name, None)
            if name in defaults and value not in (defaults[name].default, [], None):
                raise ValueError(f"{name} is {value!r}, but it must be left alone: {why}")
        if self.optim in UNSAVED_OPTIMIZERS and self.save_strategy != "no" and not self.save_only_model:
            raise ValueError(
                f"optim is {OptimizerNames(self.optim).value!r}, whose states no checkpoint can hold: adamw_bnb_8bit "
                "has some that it can; or set save_only_model=True, or save_strategy='no'"
            )
        if not isinstance(self.signed_advantages, bool):
            raise ValueError(f"signed_advantages is {self.signed_advantages!r}, but it must be True, False or None")
        if self.on_nonfinite not in POLICIES:
            raise ValueError(f"on_nonfinite is {self.on_nonfinite!r}, but it must be one of {', '.join(POLICIES)}")
        if self.inspect_tokens != UNSEEN["inspect_tokens"] and not self.inspect_steps:
            raise ValueError(f"inspect_tokens is {self.inspect_tokens}, but nothing is inspected: give inspect_steps")
        if self.cpu_products not in CPU_LIBRARIES:
            raise ValueError(f"cpu_products is {self.cpu_products!r}, but it must be one of {', '.join(CPU_LIBRARIES)}")
        self.check_data()
        if self.positions_per_row is not None and self.positions_per_row > self.seq_length:
            raise ValueError(
                f"positions_per_row is {self.positions_per_row}, but it must be at most the {self.seq_length} of "
                "seq_length; None is all of a row"
            )
        self.check_lora()
        if self.thought_temperature < 0:
            raise ValueError(f"thought_temperature is {self.thought_temperature}, but it must be at least 0")
        self.objective()  # which checks the others

    def _check_stages(self, curriculum: Curriculum) -> None:
        """Take the number of steps from the stages; refuse another one."""
        self.stages = curriculum.described()
        if self.max_steps not in (-1, curriculum.steps):
            raise ValueError(
                f"max_steps is {self.max_steps!r}, but the stages have {curriculum.steps} steps: leave it out"
            )
        if self.num_train_epochs != TrainingArguments.num_train_epochs:
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}, but the stages say how long: leave it out")
        if self.learning_rate == 0:
            raise ValueError("learning_rate is 0, but with stages it must be above 0")
        self.max_steps = curriculum.steps

    @property
    def curriculum(self) -> Curriculum | None:
        """The stages as they are given; None where there are none."""
        return None if self.stages is None else read_stages(self.stages)

    @property
    def folder(self) -> Path:
        """Where the model, the metrics and the checkpoints lie."""
        assert self.output_dir is not None  # TrainingArguments has put a name where there was none
        return Path(self.output_dir)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return super().to_dict() | {"lora": self.described_lora()}

    def objective(self) -> Objective:
        """The objective that these settings describe."""
        return Objective(
            policy_weight=self.policy_weight,
            likelihood_weight=cast(float, self.likelihood_weight),  # which the preset has set, as the others
            entropy_weight=self.entropy_weight,
            temperature=self.thought_temperature,
            reinforce_temperature=cast(float, self.reinforce_temperature),
            baseline=cast(str, self.baseline),
            signed=cast(bool, self.signed_advantages),
            max_grid_tokens=(GRID_TOKENS if self.max_grid_tokens is None else self.max_grid_tokens) or None,
            positions_per_row=self.positions_per_row,
        )
