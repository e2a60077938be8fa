"""transformers' Trainer for a model that thinks."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils import PushInProgress

from qstar.data import PadRight
from qstar.distilling import Distillation
from qstar.evaluation.held_out import evaluate_rows
from qstar.evaluation.tables import finite_or_none
from qstar.grid import Counts, ThoughtGrid
from qstar.inspection.data import Inspection
from qstar.inspection.run import inspect_tokens
from qstar.inspection.settings import InspectionSettings
from qstar.learning import Objective, QuietStarOutput
from qstar.model import QuietStarModel
from qstar.talking import read_batch
from qstar.training.callbacks import CollapseWarning, ProgressLine, show_thoughts
from qstar.training.card import Sources, model_card, write_card
from qstar.training.finite import MOST_SKIPPED, not_finite, not_finite_before_a_thought, what_to_try
from qstar.training.hub import push_checkpoint
from qstar.training.inspections import HeldOut, InspectSteps
from qstar.training.memory import evaluation_advice, explained, inspection_advice, training_advice
from qstar.training.rates import RatesTrainer
from qstar.training.settings import QuietStarArguments
from qstar.training.sharding import in_step
from qstar.training.thought_statistics import ThoughtStatistics
from qstar.training.thought_table import first_text, score, thought_rows, write_table
from qstar_kernels import cpu_products

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LOGGED = ("likelihood_loss", "policy_loss", "nll_base", "nll_talk", "reward", "rewarded", "mixing_weight")
OF_SOME_OBJECTIVES = ("policy_entropy", "divergence")
IGNORED_HOOKS = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")


class QuietStarTrainer(RatesTrainer):
    """transformers' Trainer for a model from :func:`qstar.wrap`.

    Every logged value also goes to ``metrics.jsonl`` in the output folder. Rows are dictionaries of ``input_ids`` and
    ``position_ids``, as :func:`qstar.data.pack` makes them. The loss of an update is the same however its rows are
    split into batches and processes.

    Attributes:
        counts: what the means of the update are taken over, where it has more than one batch or process.
        sources: what the run began with, for its model card.
        skipped_updates: how many were left out, since they were not finite.
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
        if self.is_deepspeed_enabled and args.on_nonfinite == "skip":
            raise ValueError(
                "on_nonfinite is 'skip', but with DeepSpeed it must be 'stop': weights change there before an update "
                "can be looked at"
            )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ProgressLine)
        if not model.qstar.pauses:
            self.add_callback(CollapseWarning)
        if args.inspect_steps:
            self.add_callback(InspectSteps(self._inspect, self.eval_dataset, tokenizer, args))
        self.objective: Objective = args.objective()
        self.objective.check(model)
        if not model.qstar.mixing_head and args.mixing_head_lr_factor != QuietStarArguments.mixing_head_lr_factor:
            raise ValueError(
                f"mixing_head_lr_factor is {args.mixing_head_lr_factor}, but the model has no mixing head: it would be "
                "ignored"
            )
        if self.is_deepspeed_enabled:
            self.objective = replace(self.objective, max_grid_tokens=None)
        elif self.is_fsdp_enabled and isinstance(self.data_collator, PadRight):
            # All processes must pass through the model as often: grids of one size have as many parts.
            self.data_collator = replace(self.data_collator, length=args.seq_length)
        self._update: dict[str, Tensor] = {}  # values of the update at hand
        self._thoughts: list[tuple[Tensor, Tensor]] = []  # of its batches, and where they are about text
        self._sample: dict[str, Tensor] = {}  # a text of it and the thoughts about it, where they are to be shown
        self._seen: dict[str, list[Tensor]] = defaultdict(list)  # those of updates since the last log
        self._thought_statistics = ThoughtStatistics()  # of updates since the last log
        self._skipped_in_a_row = 0
        self._batch_of_step = (-1, 0)
        self.counts: Counts | None = None
        self.sources = Sources()
        self.skipped_updates = 0

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, see :meth:`CheckpointTrainer.train`.

        Raises:
            OutOfMemory: a step does not fit in memory, with the settings to lower.
            FloatingPointError: the loss or a gradient is not finite.
        """

        def advice() -> str:
            grid = ThoughtGrid(self.args.seq_length, **self.thinking_model.qstar.sizes)
            return training_advice(self.args, grid, self.objective.max_grid_tokens)

        with explained(advice), cpu_products(self.args.cpu_products):
            return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, and its output as well where asked for."""
        try:
            output = model(**inputs, objective=self._objective_for(inputs["input_ids"]))
        except ValueError as error:  # where logits are NaN, what is sampled may be a token that is forbidden
            sampled = "forbidden" in str(error) and not self.is_fsdp_enabled  # where one process cannot look alone
            wrong = not_finite_before_a_thought(self.thinking_model, inputs) if sampled else []
            if not wrong:
                raise
            raise FloatingPointError(
                f"{wrong[0]} is not finite in step {self.state.global_step + 1}, so that no thought can be sampled: "
                f"training stops; checkpoints are as they were. To go on, {what_to_try(wrong[0])}"
            ) from error
        for name in LOGGED + OF_SOME_OBJECTIVES:
            if (value := getattr(output, name)) is not None:
                self._add_up(name, value.detach())
        holds_text = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        self._thoughts.append((output.thoughts, output.at_thoughts(holds_text)))
        if self._due(self.args.gradient_norm_steps) and self._can_differentiate_twice() and not self.distils:
            self._log_gradient_norms(model, output)
        if self._due(self.args.sample_steps):
            self._sample = first_text(inputs, output)
        loss = self._as_part(output.loss)
        return (loss, output) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a batch; an update that is not finite does not reach the weights.

        Raises:
            FloatingPointError: the loss or a gradient is not finite, and ``on_nonfinite`` says to stop.
        """
        loss = super().training_step(*args, **kwargs)
        self._add_up("loss", loss)
        if not self.accelerator.sync_gradients:
            return loss
        if not self.args.fp16 and not self._is_finite():  # in fp16 a scaler skips such updates
            return torch.zeros_like(loss)
        if self._sample:
            self._write_thoughts(self._sample)
        self._update.pop("loss")  # which the Trainer logs
        for name, value in self._update.items():
            self._seen[name].append(value)
        words = self.thinking_model.config.get_text_config(decoder=True).vocab_size
        for thoughts, counted in self._thoughts:
            self._thought_statistics.add(thoughts, counted, words)
        return loss

    def _is_finite(self) -> bool:
        """Whether the update at hand is finite; leaves nothing of one that is not, where such are skipped."""
        accelerator = self.accelerator
        wrong = not_finite(self._update, self.thinking_model, cast(Any, accelerator.reduce), gather_object)
        if not wrong:
            self._skipped_in_a_row = 0
            return True
        others = f", one of {len(wrong)} that are not" if len(wrong) > 1 else ""
        found = f"{wrong[0]} is not finite in step {self.state.global_step + 1}{others}"
        advice = what_to_try(wrong[0])
        if self.args.on_nonfinite == "stop":
            when = "" if self.is_deepspeed_enabled else " before the weights change"
            raise FloatingPointError(
                f"{found}: training stops{when}; checkpoints are as they were. To go on, {advice}, "
                "or on_nonfinite='skip', which leaves such updates out"
            )
        if self._skipped_in_a_row == MOST_SKIPPED:
            raise FloatingPointError(
                f"{found}, and the {MOST_SKIPPED} steps before it were left out for the like: training stops; "
                f"checkpoints are as they were. To go on, {advice}"
            )
        self._skipped_in_a_row += 1
        self.skipped_updates += 1
        logger.warning("%s: the update is left out", found)
        cast(nn.Module, self.model).zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
        self._tr_loss.copy_(self._loss_before)
        self._globalstep_last_logged += 1  # so that the mean is over the updates that were made
        return False

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """The batches of one update; what its means are over is counted in all of them, on all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._update, self._thoughts, self._sample = {}, [], {}
        self._loss_before = self._tr_loss.clone()
        self.counts = None
        if len(batches) > 1 or self.args.world_size > 1:
            model = self.thinking_model
            counted = torch.zeros(model.qstar.ahead_tokens + 2, dtype=torch.int64, device=device)
            for number, batch in enumerate(batches):
                text = read_batch(model, **{name: value.to(device) for name, value in batch.items()})
                counted += text.counts(self._objective_of(number, text.tokens).grid(model, text)).stacked()
            self.counts = Counts.from_stacked(cast(Tensor, self.accelerator.reduce(counted)))
        return batches, items

    def _as_part(self, loss: Tensor) -> Tensor:
        """A batch's loss so scaled that the update's is the sum of its parts: what else is done to it is undone."""
        if self.counts is None:
            return loss
        return loss * self.current_gradient_accumulation_steps * self.args.world_size

    def _add_up(self, name: str, value: Tensor) -> None:
        """Keep a value of this batch, as a part of its update's."""
        self._update[name] = self._update[name] + value if name in self._update else value

    def _can_differentiate_twice(self) -> bool:
        options = cast(dict[str, Any], self.args.gradient_checkpointing_kwargs or {})
        reentrant = options.get("use_reentrant", False)
        whole = self.args.world_size == 1 and not self.is_sharded
        return whole and not (self.args.gradient_checkpointing and reentrant)

    def _objective_for(self, input_ids: Tensor) -> Objective | Distillation:
        """The objective of the next batch of this step."""
        step, batch = self._batch_of_step
        batch = batch + 1 if step == self.state.global_step else 0
        self._batch_of_step = (self.state.global_step, batch)
        return self._objective_of(batch, input_ids)

    def _objective_of(self, batch: int, input_ids: Tensor) -> Objective | Distillation:
        """The objective with a seed for this step, and row numbers that no other batch of the step has."""
        positions = max(self.args.seq_length, input_ids.shape[1])
        rows = self.args.train_batch_size * positions * self.thinking_model.qstar.rationales
        objective: Objective | Distillation = self.objective
        if self.distils:
            names = ("likelihood_weight", "temperature", "max_grid_tokens", "positions_per_row")
            objective = Distillation(**{name: getattr(self.objective, name) for name in names})
        return replace(
            objective,
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
            self._update[f"{name}_gradient_norm"] = norms.norm()

    def _write_thoughts(self, sample: dict[str, Tensor]) -> None:
        """Show some thoughts about a text of this update, and write a table of more; all processes do the pass."""
        with self.accelerator.autocast():
            spoken = self.thinking_model(**sample, objective=score)
        tokenizer, step = cast(PreTrainedTokenizerBase | None, self.processing_class), self.state.global_step
        if not self.is_world_process_zero():
            return
        thoughts = show_thoughts(tokenizer, sample["input_ids"], sample["thoughts"], sample.get("positions"))
        self._write({"step": step, "thoughts": thoughts})
        if tokenizer is not None:
            row = {name: values[0] for name, values in sample.items()}
            rows = thought_rows(tokenizer, row["input_ids"], row["thoughts"], spoken, step, row.get("positions"))
            if rows:  # `datasets` cannot read a table without
                write_table(rows, self.args.folder, step)

    def _inspect(self, step: int, held_out: HeldOut) -> Inspection:
        """What the model thinks about texts after ``step`` updates; all processes do the passes."""
        args, tokenizer = self.args, cast(PreTrainedTokenizerBase, self.processing_class)
        settings = InspectionSettings(
            seq_length=args.seq_length,
            max_tokens=args.inspect_tokens,
            max_grid_tokens=self.objective.max_grid_tokens,
        )
        name = f"{args.folder}, step {step}"
        with explained(lambda: inspection_advice(self.objective.max_grid_tokens)), self.accelerator.autocast():
            return inspect_tokens(
                self.thinking_model, tokenizer, held_out.documents, settings, cut=held_out.cut, name=name
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over the updates since the last call, and write all of it to ``metrics.jsonl``."""
        if "loss" in logs:
            for name, values in self._seen.items():
                logs[name] = float(self.accelerator.gather(torch.stack(values).mean().float()).sum())
            self._seen.clear()
            logs |= self._thought_statistics.summary(cast(Any, self.accelerator.reduce))
            if self.args.on_nonfinite == "skip":
                logs["skipped_updates"] = self.skipped_updates
                if self._skipped_in_a_row:
                    logs.pop("grad_norm", None)  # of an update that was not made
        super().log(logs, start_time)
        self._write({"step": self.state.global_step, **logs})

    def create_model_card(  # type: ignore[override]  # it refuses what the Trainer's own card has, and this one has not
        self, language: Any = None, license: str | None = None, tags: Any = None, model_name: str | None = None
    ) -> None:
        """Write the model card into the folder of the run, see :func:`qstar.training.card.model_card`."""
        if self.is_world_process_zero():
            logged = {name: value for record in self.state.log_history for name, value in record.items()}
            metadata = dict(language=language, license=license, tags=tags)
            model, steps, repo = self.thinking_model, self.state.global_step, self.hub_model_id
            card = model_card(model, self.args, self.sources, logged, steps, name=model_name, repo=repo, **metadata)
            write_card(card, self.args.folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint as ``hub_strategy`` says, see :func:`qstar.training.hub.push_checkpoint`."""
        pushes = cast(PushInProgress | None, self.push_in_progress)
        busy = pushes is not None and not pushes.is_done()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        place = dict(repo_id=self.hub_model_id, token=self.args.hub_token, revision=self.args.hub_revision)
        message = f"Training in progress, step {self.state.global_step}"
        strategy = HubStrategy(self.args.hub_strategy)
        jobs = push_checkpoint(Path(checkpoint_folder), self.args.folder, strategy, message, **place)
        if busy:
            jobs += cast(Any, pushes).jobs
        self.push_in_progress = cast(Any, PushInProgress(cast(Any, jobs)))

    def _write(self, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            path = self.args.folder / METRICS_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(finite_or_none(record), allow_nan=False) + "\n")

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
        """Held-out log-likelihood with and without thoughts, see :func:`qstar.evaluation.held_out.evaluate_rows`.

        Raises:
            OutOfMemory: a batch does not fit in memory, with the setting to lower.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            every = [self.evaluate(each, ignore_keys, f"{metric_key_prefix}_{name}") for name, each in dataset.items()]
            return {name: value for metrics in every for name, value in metrics.items()}
        batches = self.get_eval_dataloader(eval_dataset)
        if self.is_sharded:
            batches = in_step(batches, self.accelerator)
        advice = explained(lambda: evaluation_advice(self.args))
        with advice, cpu_products(self.args.cpu_products), self.accelerator.autocast():
            result = evaluate_rows(self.thinking_model, batches, total=cast(Any, self.accelerator.reduce))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in result.summary().items()}
        metrics[f"{metric_key_prefix}_loss"] = (result.nll_base + result.nll_talk) / 2
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
