"""transformers' Trainer with a learning rate for each kind of parameter."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from qstar.training.saving import CheckpointTrainer


class RatesTrainer(CheckpointTrainer):
    """The Trainer whose new parameters, those of the mixing head and the thoughts, learn at rates of their own."""

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
