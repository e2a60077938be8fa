"""transformers' Trainer for a model that thinks."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.trainer_callback import ProgressCallback

from qstar.data import PadRight
from qstar.evaluation.held_out import evaluate_rows
from qstar.evaluation.tables import finite_or_none
from qstar.grid import Counts
from qstar.learning import Objective, QuietStarOutput
from qstar.model import QuietStarModel
from qstar.talking import read_batch
from qstar.training.callbacks import ProgressLine, show_thoughts
from qstar.training.saving import CheckpointTrainer
from qstar.training.settings import QuietStarArguments
from qstar.training.sharding import in_step

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LOGGED = ("likelihood_loss", "policy_loss", "nll_base", "nll_talk", "reward", "rewarded", "mixing_weight")
IGNORED_HOOKS = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")


class QuietStarTrainer(CheckpointTrainer):
    """transformers' Trainer for a model from :func:`qstar.wrap`.

    Every logged value also goes to ``metrics.jsonl`` in the output folder. Rows are dictionaries of ``input_ids`` and
    ``position_ids``, as :func:`qstar.data.pack` makes them. The loss of an update is the same however its rows are
    split into batches and processes.

    Attributes:
        counts: what the means of the update are taken over, where it has more than one batch or process.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, model: QuietStarModel, args: QuietStarArguments, **kwargs: Any):
        for name in IGNORED_HOOKS:
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is given, but it would be ignored: the losses and the evaluation are Quiet-STaR's own"
                )
        if args.n_gpu > 1:
            logger.warning("training on one of %d GPUs: start with torchrun to train on all", args.n_gpu)
            args._n_gpu = 1  # nn.DataParallel runs replicas as threads over one open thought layout
        if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
            logger.warning(
                "some weights that learn are 16-bit, where steps as small as learning_rate = %g are lost: "
                "load the model in float32 and pass bf16=True",
                args.learning_rate,
            )
        tokenizer = kwargs.get("processing_class")
        kwargs.setdefault("data_collator", PadRight(getattr(tokenizer, "pad_token_id", None) or 0))
        super().__init__(model, args, **kwargs)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine)
        self.objective: Objective = args.objective()
        self._seen: dict[str, list[Tensor]] = defaultdict(list)
        self._batch_of_step = (-1, 0)
        self.counts: Counts | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, and its output as well where asked for."""
        output = model(**inputs, objective=self._objective_for(inputs["input_ids"]))
        for name in LOGGED:
            self._add_up(name, getattr(output, name).detach())
        if self._due(self.args.gradient_norm_steps) and self._can_differentiate_twice():
            self._log_gradient_norms(model, output)
        if self._due(self.args.sample_steps) and self.is_world_process_zero():
            thoughts = show_thoughts(cast(Any, self.processing_class), inputs["input_ids"], output.thoughts)
            self._write({"step": self.state.global_step, "thoughts": thoughts})
        loss = self._as_part(output.loss)
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a batch; stops before an update that would make weights infinite or NaN.

        Raises:
            FloatingPointError: the loss or a gradient is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and not self.args.fp16:  # where a scaler skips such steps
            self._check_finite(loss)
        return loss

    def _check_finite(self, loss: Tensor) -> None:
        values = {"the loss": loss.detach()}
        for name, parameter in self.thinking_model.named_parameters():
            if parameter.grad is not None:
                gradient: Any = parameter.grad
                values[f"the gradient of {name}"] = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        if self._total(torch.nn.utils.get_total_norm(values.values())).isfinite():
            return
        # The norm may be beyond a float where no value is.
        counts = self._total(torch.stack([(~x.isfinite()).sum() for x in values.values()])).tolist()
        wrong = [name for name, count in zip(values, counts, strict=True) if count]
        if wrong:
            when = "with the weights changed already" if self.is_deepspeed_enabled else "before the weights change"
            raise FloatingPointError(
                f"{wrong[0]} is not finite in step {self.state.global_step + 1}, one of {len(wrong)} such tensors: "
                f"training stops {when}; checkpoints are as they were"
            )

    def _total(self, values: Tensor) -> Tensor:
        """The sum over processes that hold a part of each gradient; ``values`` where every process has them all."""
        return cast(Tensor, self.accelerator.reduce(values)) if self.is_sharded else values

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The batches of one update; what its means are over is counted in all of them, on all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.counts = None
        if len(batches) > 1 or self.args.world_size > 1:
            model = self.thinking_model
            counted = torch.zeros(model.qstar.ahead_tokens + 2, dtype=torch.int64, device=device)
            for batch in batches:
                text = read_batch(model, **{name: value.to(device) for name, value in batch.items()})
                counted += text.counts(model.grid(text.tokens.shape[1])).stacked()
            self.counts = Counts.from_stacked(cast(Tensor, self.accelerator.reduce(counted)))
        return batches, items

    def _as_part(self, loss: Tensor) -> Tensor:
        """A batch's loss so scaled that the update's is the sum of its parts: what else is done to it is undone."""
        if self.counts is None:
            return loss
        return loss * self.current_gradient_accumulation_steps * self.args.world_size

    def _add_up(self, name: str, value: Tensor) -> None:
        """Keep a value of this batch for the log, as a part of its update's."""
        if self._batch_of_step[1] and self._seen[name]:
            value = self._seen[name].pop() + value
        self._seen[name].append(value)

    def _can_differentiate_twice(self) -> bool:
        options = cast(dict[str, Any], self.args.gradient_checkpointing_kwargs or {})
        reentrant = options.get("use_reentrant", False)
        whole = self.args.world_size == 1 and not self.is_sharded
        return whole and not (self.args.gradient_checkpointing and reentrant)

    def _objective_for(self, input_ids: Tensor) -> Objective:
        """The objective with a seed for this step, and row numbers that no other batch of the step has."""
        step, batch = self._batch_of_step
        batch = batch + 1 if step == self.state.global_step else 0
        self._batch_of_step = (self.state.global_step, batch)
        positions = max(self.args.seq_length, input_ids.shape[1])
        rows = self.args.train_batch_size * positions * self.thinking_model.qstar.rationales
        return replace(
            self.objective,
            seed=(self.args.seed << 32) + self.state.global_step,
            row_offset=(batch * self.args.world_size + self.args.process_index) * rows,
            counts=self.counts,
        )

    def _due(self, every: int) -> bool:
        first = self.state.global_step % every == 0 and self._batch_of_step[1] == 0 if every else False
        return first and self.thinking_model.training

    def _log_gradient_norms(self, model: nn.Module, output: QuietStarOutput) -> None:
        """Log both losses' gradient norms, so that one starving the other is seen."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for name, loss in (("likelihood", output.likelihood_loss), ("policy", output.policy_loss)):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            norms = torch.stack([gradient.float().norm() for gradient in gradients if gradient is not None])
            self._seen[f"{name}_gradient_norm"].append(norms.norm())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the updates since the last call, and write all of it to ``metrics.jsonl``."""
        if "loss" in logs:
            for name, values in self._seen.items():
                logs[name] = float(self.accelerator.gather(torch.stack(values).mean().float()).sum())
            self._seen.clear()
        super().log(logs, start_time)
        self._write({"step": self.state.global_step, **logs})

    def _write(self, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            path = self.args.folder / METRICS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(finite_or_none(record), allow_nan=False) + "\n")

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with the mixing head and the thought embeddings in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        named = dict(cast(nn.Module, self.model if model is None else model).named_parameters())
        head = [p for name, p in named.items() if "qstar_mixing_head" in name and p.requires_grad]
        embeddings = [p for name, p in named.items() if name.endswith(("qstar_start", "qstar_end")) and p.requires_grad]
        mine = {id(p) for p in head + embeddings}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
        for params, factor in (
            (head, self.args.mixing_head_lr_factor),
            (embeddings, self.args.thought_embedding_lr_factor),
        ):
            if params:
                optimizer.add_param_group(
                    {"params": params, "lr": self.args.learning_rate * factor, "weight_decay": 0.0}
                )
        return optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Every row once: no process takes rows again so as to have as many as another."""
        config = self.accelerator.dataloader_config
        before, config.even_batches = config.even_batches, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            config.even_batches = before

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Held-out log-likelihood with and without thoughts, see :func:`qstar.evaluation.held_out.evaluate_rows`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            every = [self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}") for name, each in dataset.items()]
            return {name: value for metrics in every for name, value in metrics.items()}
        batches = self.get_eval_dataloader(eval_dataset)
        if self.is_sharded:
            batches = in_step(batches, self.accelerator)
        with self.accelerator.autocast():
            result = evaluate_rows(self.thinking_model, batches, total=cast(Any, self.accelerator.reduce))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.summary().items()}
        metrics[f"{metric_key_prefix}_loss"] = (result.nll_base + result.nll_talk) / 2
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
