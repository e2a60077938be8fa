"""transformers' Trainer with checkpoints that can be trusted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from qstar.adapters import has_adapters, holds_adapters, load_adapters
from qstar.model import PREFIX, QuietStarModel
from qstar.training.checkpoints import begin, checkpoint_to_resume, fault, finish, is_finished, partial, rotate
from qstar.training.parallelism import check_running
from qstar.training.settings import QuietStarArguments
from qstar.training.sharding import keep_losses_exact, load_parts, optimizer_parts, whole, whole_state
from qstar.training.states import random_state, read_state, set_random_state, write_state

logger = logging.getLogger(__name__)

OPTIMIZER, SCHEDULER, SCALER, RANDOM = "optimizer", "scheduler", "scaler", "random_state"
SETTINGS_FILE = "training_args.json"


class CheckpointTrainer(Trainer):
    """transformers' Trainer, whose checkpoints are written beside their place and renamed when they are whole.

    Nothing in them is pickled, and one that is not as it was written is not read; see
    :mod:`qstar.training.checkpoints` and :mod:`qstar.training.states`.
    """

    args: QuietStarArguments

    def __init__(self, model: QuietStarModel, args: QuietStarArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        check_running(args, self.accelerator, model, self.get_tp_size())
        if self.is_sharded:
            self._check_shardable(model, args)
        if self.is_fsdp_enabled:
            keep_losses_exact(self.accelerator)
        if self.is_deepspeed_enabled and args.save_strategy != "no":
            raise ValueError(
                f"save_strategy is {SaveStrategy(args.save_strategy).value!r}, but with DeepSpeed it must be 'no': its "
                "checkpoints could only be read by unpickling"
            )

    def _check_shardable(self, model: QuietStarModel, args: QuietStarArguments) -> None:
        if has_adapters(model):
            raise ValueError("lora is set, but with FSDP or DeepSpeed it must not be: DDP trains adapters")
        if args.max_grid_tokens and self.is_deepspeed_enabled:
            raise ValueError(
                f"max_grid_tokens is {args.max_grid_tokens}, but with DeepSpeed it must be 0: its passes in parts have "
                "not been tried"
            )
        if args.positions_per_row is not None and self.is_deepspeed_enabled:
            raise ValueError(
                f"positions_per_row is {args.positions_per_row}, but with DeepSpeed it must be None: its passes, a "
                "text's and its thoughts', have not been tried"
            )

    @property
    def thinking_model(self) -> QuietStarModel:
        """The model, without what wraps it for several processes."""
        return cast(QuietStarModel, self.accelerator.unwrap_model(cast(nn.Module, self.model)))

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds, from the first step on, only a part of weights, gradients or the optimizer."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def train(
        self,
        resume_from_checkpoint: bool | str | Path | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the last whole checkpoint of the folder on (True) or from a given one.

        A run that is finished is taken up as it ended.

        Raises:
            ValueError: the given checkpoint is not as it was written.
        """
        checkpoint = checkpoint_to_resume(self.args.folder, resume_from_checkpoint)
        if checkpoint is None:
            return super().train(None, trial, ignore_keys_for_eval)
        if not is_finished(checkpoint, self.args.max_steps, self.args.num_train_epochs):
            return super().train(str(checkpoint), trial, ignore_keys_for_eval)
        logger.warning("%s is the end of its run: there is nothing left to train", checkpoint)
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, float("nan"), {})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, in the order of transformers' own; the methods that it calls write into its folder."""
        if trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial=trial))
        checkpoint = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin(checkpoint)
        self.accelerator.wait_for_everyone()
        folder = partial(checkpoint)
        self.save_model(str(folder), _internal_call=True)
        self._find_best(run, checkpoint)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.args.should_save:
            kept = [
                each for each in (*self.callback_handler.callbacks, self.control) if isinstance(each, ExportableState)
            ]
            self.state.stateful_callbacks = TrainerState(stateful_callbacks=cast(Any, kept)).stateful_callbacks
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            (folder / SETTINGS_FILE).write_text(self.args.to_json_string() + "\n")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            rotate(checkpoint, self.state.best_model_checkpoint, self.args.save_total_limit)

    def _find_best(self, run: Path, written: Path | None = None) -> None:
        """Name the best checkpoint where it lies now: the folder of the run may have moved."""
        if self.state.best_global_step:
            best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == written or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as ``save_pretrained`` does; all processes together, of which the first one writes."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        state = whole(cast(nn.Module, self.model).state_dict(), keep=self.args.should_save)
        self._save(output_dir, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # a pickle, which nothing here reads; SETTINGS_FILE has what it says
            (Path(output_dir or self.args.folder) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = whole_state(cast(Any, self.optimizer), keep=self.args.should_save)
        if self.args.should_save:
            write_state(state, Path(output_dir) / OPTIMIZER)
            write_state(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER)

    def _save_scaler(self, output_dir: str) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and self.args.should_save:
            write_state(scaler.state_dict(), Path(output_dir) / SCALER)

    def _save_rng_state(self, output_dir: str) -> None:
        write_state(random_state(self.args.device), self._random_state_of_process(output_dir))

    def _random_state_of_process(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"{RANDOM}_{self.args.process_index}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if has_adapters(self.thinking_model) != holds_adapters(resume_from_checkpoint):
            there, here = ("adapters", "a whole model")[:: 1 if holds_adapters(resume_from_checkpoint) else -1]
            raise ValueError(
                f"resume_from_checkpoint is {resume_from_checkpoint!r}, which holds {there}, but this run trains "
                f"{here}: give the setting lora that it began with"
            )
        if self.is_fsdp_enabled:
            load_parts(self.thinking_model, resume_from_checkpoint)
            return
        if has_adapters(self.thinking_model):
            load_adapters(self.thinking_model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.thinking_model.load_thoughts(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (Path(checkpoint) / f"{OPTIMIZER}.json").is_file():
            raise ValueError(
                f"resume_from_checkpoint is {checkpoint!r}, but it holds no {OPTIMIZER}.json to go on with: it was "
                "written with save_only_model"
            )
        optimizer = cast(Any, self.optimizer)
        optimizer.load_state_dict(optimizer_parts(read_state(Path(checkpoint) / OPTIMIZER), optimizer))
        cast(Any, self.lr_scheduler).load_state_dict(read_state(Path(checkpoint) / SCHEDULER))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if checkpoint is not None and scaler is not None and (Path(checkpoint) / f"{SCALER}.json").is_file():
            scaler.load_state_dict(read_state(Path(checkpoint) / SCALER))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = self._random_state_of_process(checkpoint)
        if not path.with_suffix(".json").is_file():
            logger.warning("%s is missing, as it was written by fewer processes: random numbers begin anew", path)
            return
        set_random_state(read_state(path), self.args.device)

    def _load_best_model(self) -> None:
        self._find_best(self.args.folder)
        best = cast(str, self.state.best_model_checkpoint)
        wrong = fault(Path(best))
        if wrong is not None:
            raise ValueError(f"the best model of the run is that of {best}, but {wrong}")
        if self.is_fsdp_enabled:
            load_parts(self.thinking_model, best)
            return
        if has_adapters(self.thinking_model):
            load_adapters(self.thinking_model, best)
        else:
            super()._load_best_model()
        self.thinking_model.load_thoughts(best)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Our parameters are not missing: :meth:`QuietStarModel.load_thoughts` reads them from files of their own."""
        missing = [name for name in load_result.missing_keys if not name.startswith(PREFIX)]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))
