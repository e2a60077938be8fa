"""transformers' Trainer with a learning rate for each kind of parameter, and for each stage of a curriculum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SchedulerType, TrainOutput

from qstar.learning import never_counts
from qstar.model import PREFIX, QuietStarModel
from qstar.training.saving import CheckpointTrainer
from qstar.training.settings import QuietStarArguments
from qstar.training.stages import Curriculum, Stage


class RatesTrainer(CheckpointTrainer):
    """The Trainer whose new parameters, those of the mixing head and the thoughts, learn at rates of their own.

    Attributes:
        curriculum: the stages of the run, in which nothing is None; None where it has none.
    """

    def __init__(self, model: QuietStarModel, args: QuietStarArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        if self.is_deepspeed_enabled and args.curriculum:
            raise ValueError("stages is set, but with DeepSpeed it must not be: stages have not been tried with it")
        self.curriculum = self._resolved(model.qstar.sizes) if args.curriculum else None

    def _resolved(self, sizes: dict[str, int]) -> Curriculum:
        """The curriculum of the settings, which from now on say all of it; what cannot be trained is refused."""
        curriculum = cast(Curriculum, self.args.curriculum).resolved(**sizes, learning_rate=self.args.learning_rate)
        self.args.stages = curriculum.described()
        if curriculum.stages[0].distil and never_counts(self.thinking_model):
            raise ValueError("stage 1 distils, but the mixing head starts at zero: there is nothing to distil yet")
        for stage in curriculum.stages:
            self.thinking_model.grid(self.args.seq_length, **stage.sizes)  # which checks that it has the positions
            self._schedule(stage)
        return curriculum

    def _schedule(self, stage: Stage) -> Callable[[int], float]:
        """The learning rate of a stage's updates, counted from 0, over the run's."""
        rate, args = cast(float, stage.learning_rate), self.args
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros((), requires_grad=True)], lr=rate),
            num_warmup_steps=args.get_warmup_steps(stage.steps),
            num_training_steps=stage.steps,
            scheduler_specific_kwargs=cast(Any, args.lr_scheduler_kwargs),
        )
        if not isinstance(scheduler, LambdaLR):
            kind = SchedulerType(args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_type is {kind!r}, but with stages it must be one whose rate depends on the step alone"
            )
        [factor] = scheduler.lr_lambdas
        return lambda step: factor(step) * rate / args.learning_rate

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The Trainer's schedule; with a curriculum that of each stage, one after the other."""
        if self.curriculum is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        curriculum = self.curriculum
        schedules = [self._schedule(stage) for stage in curriculum.stages]

        def factor(step: int) -> float:
            number, begin = curriculum.find(step)
            return schedules[number](step - begin)

        self.lr_scheduler = LambdaLR(cast(Any, self.optimizer if optimizer is None else optimizer), factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def enter(self, step: int) -> None:
        """Give the model the sizes of the stage that update ``step``, counted from 0, is made in."""
        if self.curriculum is not None:
            model = self.thinking_model
            model.qstar = replace(model.qstar, **self.curriculum.at(step).sizes)

    @property
    def distils(self) -> bool:
        """Whether the update at hand is of a stage that distils."""
        return self.curriculum is not None and self.curriculum.at(self.state.global_step).distil

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of a batch; a stage that distils leaves what makes the thoughts as it is."""
        loss = super().training_step(*args, **kwargs)
        if self.distils:
            for name, parameter in self.thinking_model.named_parameters():
                if name.startswith(PREFIX):
                    parameter.grad = None  # one of 0 would let the optimizer's momentum move it
        return loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, see :meth:`CheckpointTrainer.train`; the model ends with the sizes of the last stage."""
        self.enter(0)
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = json.loads((Path(resume_from_checkpoint) / TRAINER_STATE_NAME).read_text())
        self.enter(state["global_step"])

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The batches of one update, which begins its stage where it is the first of one."""
        self.enter(self.state.global_step)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the number of the stage, from 1, that the last update was made in."""
        if self.curriculum is not None:
            logs["stage"] = self.curriculum.find(max(self.state.global_step - 1, 0))[0] + 1
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; mixing head, thought embeddings and adapters in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        named = dict(cast(nn.Module, self.model if model is None else model).named_parameters())
        head = [p for name, p in named.items() if "qstar_mixing_head" in name and p.requires_grad]
        embeddings = [p for name, p in named.items() if name.endswith(("qstar_start", "qstar_end")) and p.requires_grad]
        lora = [p for name, p in named.items() if ".lora_" in name and p.requires_grad]
        mine = {id(p) for p in head + embeddings + lora}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
        for params, factor, decay in (
            (head, self.args.mixing_head_lr_factor, 0.0),
            (embeddings, self.args.thought_embedding_lr_factor, 0.0),
            (lora, self.args.lora_lr_factor, self.args.weight_decay),
        ):
            if params:
                optimizer.add_param_group(
                    {"params": params, "lr": self.args.learning_rate * factor, "weight_decay": decay}
                )
        return optimizer
