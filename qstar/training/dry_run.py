"""A run that is tried: everything is read and resolved, one step is taken, and nothing of it is kept."""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from qstar.cpu import keep_freed_memory
from qstar.training.folders import check_unused, default_folders
from qstar.training.prepare import Prepared, prepare, split_settings
from qstar.training.savable import check_savable, saved_bytes
from qstar.training.settings import UNSEEN, QuietStarArguments
from qstar.training.step_memory import StepMemory
from qstar.training.trainer import QuietStarTrainer

OTHERWISE: dict[str, Any] = dict(
    push_to_hub=False, eval_on_start=False, report_to="none", disable_tqdm=True, **UNSEEN
)  # in the step that is tried
MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class DryRun:
    """What a step of a run took, and what the run would take.

    Attributes:
        model: the name of its class.
        parameters: of the model.
        learned: of them, those that learn.
        rows: of text; None for a stream.
        seq_length: text tokens in a row, at most.
        step_rows: rows in a step, on all processes.
        steps: of the run.
        device: where it ran.
        stage: that the step was of, from 1: the one that takes most; None where the run has no stages.
        seconds: that the step took, the first one, which sets up what later ones find.
        loss: of it.
        grid: tokens in the grid of a batch, at most.
        at_once: of them, those that are read at once.
        largest: about how many could be read at once in the memory that is free; None where that cannot be told.
        memory: the most that this process has held, bytes; None where the system does not tell.
        gpu_memory: the same on the GPU; None without one.
        model_bytes: of the model on the disk.
        checkpoint_bytes: of a checkpoint.
        checkpoints: that are left at the end.
        free: bytes on the disk.
        folder: where the run would write.
    """

    model: str
    parameters: int
    learned: int
    rows: int | None
    seq_length: int
    step_rows: int
    steps: int
    device: str
    stage: int | None
    seconds: float
    loss: float
    grid: int
    at_once: int
    largest: int | None
    memory: int | None
    gpu_memory: int | None
    model_bytes: int
    checkpoint_bytes: int
    checkpoints: int
    free: int
    folder: Path

    @property
    def disk(self) -> int:
        """Bytes that are left at the end."""
        return self.model_bytes + self.checkpoints * self.checkpoint_bytes

    def __str__(self) -> str:
        step_tokens = self.step_rows * self.seq_length
        rows = "a stream of rows" if self.rows is None else f"{self.rows} rows"
        memory = "unknown" if self.memory is None else f"{self.memory / MIB:,.0f} MiB in this process"
        if self.gpu_memory is not None:
            memory += f", {self.gpu_memory / MIB:,.0f} MiB on the GPU"
        disk = f"{size(self.disk)} in {self.folder}: the model {size(self.model_bytes)}"
        if self.checkpoints:
            disk += f", checkpoints {self.checkpoints} of {size(self.checkpoint_bytes)}"
        grid = f"up to {self.grid:,} tokens in a batch, {self.at_once:,} of them read at once"
        if self.largest is not None:
            grid += f"; memory has room for about {self.largest:,} (--max-grid-tokens)"
        lines = {
            "model": f"{self.model}, {self.parameters:,} parameters, {self.learned:,} of which learn",
            "data": f"{rows} of up to {self.seq_length} tokens",
            "run": f"{self.steps:,} steps of {self.step_rows} rows, up to {step_tokens:,} tokens",
            "first step" if self.stage is None else f"stage {self.stage}": (
                f"{self.seconds:.2f} s on {self.device}, loss {self.loss:.4f}"
            ),
            "grid": grid,
            "memory": f"{memory}, at most",
            "disk": f"{disk}; {size(self.free)} are free",
        }
        if self.disk > self.free:
            lines["problem"] = "the disk has no room for the run: --save-total-limit or --save-only-model saves some"
        return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def size(number: int) -> str:
    """Bytes as a person reads them."""
    return f"{number / GIB:,.2f} GiB" if number >= GIB else f"{number / MIB:,.2f} MiB"


def dry_run(**given: Any) -> DryRun:
    """Take one step of a run, and keep nothing of it; of a curriculum, the first of the stage that takes most.

    What it needs on the way is in a temporary folder on the disk of the run's, and is removed.

    Args:
        given: what :func:`qstar.train` would be given; the model and the data by their names.

    Raises:
        ValueError: ``resume_from_checkpoint`` is given, since the first step is tried; and whatever else
            :func:`qstar.train` raises.
    """
    if given.pop("resume_from_checkpoint", None):
        raise ValueError("resume_from_checkpoint is given, but the first step of a run is tried: leave it out")
    folder = folder_of(given.pop("output_dir", None))
    named = [given.pop(name, None) for name in ("model", "dataset", "eval_dataset")]
    thoughts, settings = split_settings("train()", given)
    for name, value in zip(("model", "dataset"), named, strict=False):
        if value is None:
            raise ValueError(f"{name} is missing: give a model and a dataset, whose first step is tried")
    model, dataset, eval_dataset = named
    prepared = prepare(folder, model, dataset, None, eval_dataset, thoughts, settings)
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    with tempfile.TemporaryDirectory(prefix=".qstar-dry-run-", dir=there) as place:
        args = QuietStarArguments(**(settings | OTHERWISE | {"output_dir": place}))
        return tried(prepared, args, folder)


def folder_of(output_dir: str | Path | None) -> Path:
    """Where a run would write: ``output_dir``, or the first free default; nothing is made.

    Raises:
        FileExistsError: it holds an earlier run.
    """
    if output_dir is None:
        return next(folder for folder in default_folders() if not folder.exists())
    check_unused(Path(output_dir))
    return Path(output_dir)


def tried(prepared: Prepared, args: QuietStarArguments, folder: Path) -> DryRun:
    """Take a step of a run that would write into ``folder``, see :func:`dry_run`."""
    model, rows = prepared.model, prepared.rows
    if args.device.type == "cpu":
        keep_freed_memory()
    check_savable(model, args.folder)
    trainer = QuietStarTrainer(
        model, args, train_dataset=rows, eval_dataset=prepared.held_out, processing_class=prepared.tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    stage = None
    if trainer.curriculum is not None:
        stage = trainer.curriculum.largest()
        trainer.curriculum = replace(trainer.curriculum, stages=trainer.curriculum.stages[stage : stage + 1])
    step = OneStep(StepMemory(args.device))
    trainer.add_callback(step)
    loss = trainer.train().training_loss
    grid = model.grid(args.seq_length).row_tokens(args.positions_per_row) * args.train_batch_size
    at_once = min(grid, trainer.objective.max_grid_tokens or grid)
    parameters = list(model.parameters())
    model_bytes = saved_bytes(model)
    optimizer = cast(torch.optim.Optimizer, trainer.optimizer)
    states = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    gradients = sum(x.nbytes for x in parameters if x.requires_grad)
    gpu = args.device.type == "cuda"
    return DryRun(
        model=type(model).__name__,
        parameters=sum(x.numel() for x in parameters),
        learned=sum(x.numel() for x in parameters if x.requires_grad),
        rows=None if isinstance(rows, IterableDataset) else len(rows),
        seq_length=args.seq_length,
        step_rows=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        steps=step.steps,
        device=str(args.device),
        stage=None if stage is None else stage + 1,
        seconds=step.seconds,
        loss=loss,
        grid=grid,
        at_once=at_once,
        largest=step.memory.largest_grid(at_once, gradients, states),
        memory=peak_memory(),
        gpu_memory=torch.cuda.max_memory_allocated() if gpu else None,
        model_bytes=model_bytes,
        checkpoint_bytes=model_bytes + (0 if args.save_only_model else states),
        checkpoints=step.checkpoints,
        free=shutil.disk_usage(args.folder).free,
        folder=folder,
    )


def peak_memory() -> int | None:
    """The most memory that this process has held, bytes."""
    with contextlib.suppress(ImportError):  # under Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


class OneStep(TrainerCallback):
    """Ends a training after its first step, before anything is evaluated or saved.

    Attributes:
        steps: that the training would have taken.
        checkpoints: that it would have left.
        seconds: that the first step took.
        memory: what its forward and backward took.
    """

    def __init__(self, memory: StepMemory) -> None:
        self.memory = memory
        self.steps, self.checkpoints, self.seconds, self._began = 0, 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps, self.checkpoints = state.max_steps, checkpoints_of(args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.begin()
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.end()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._began
        control.should_training_stop = True
        control.should_evaluate = control.should_save = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False


def checkpoints_of(args: QuietStarArguments, state: TrainerState) -> int:
    """How many checkpoints a training leaves, at most; the last step has one as well where steps do."""
    most = 0
    if args.save_strategy == SaveStrategy.STEPS:
        most = math.ceil(state.max_steps / state.save_steps)
    elif args.save_strategy == SaveStrategy.EPOCH:
        most = epochs_of(state)
    elif args.save_strategy == SaveStrategy.BEST:
        by_steps = args.eval_strategy == IntervalStrategy.STEPS
        most = math.ceil(state.max_steps / state.eval_steps) if by_steps else epochs_of(state)
    if args.save_total_limit is not None and args.save_total_limit > 0:
        best = args.load_best_model_at_end and args.save_total_limit == 1  # it and the last one
        most = min(most, args.save_total_limit + best)
    return most


def epochs_of(state: TrainerState) -> int:
    """Epochs of a training; a stream is one, which transformers calls endlessly many."""
    return 1 if state.num_train_epochs == sys.maxsize else state.num_train_epochs
