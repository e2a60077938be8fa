"""Out of memory: which setting to lower, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from qstar.grid import ThoughtGrid
from qstar.training.settings import QuietStarArguments

CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the message of a RuntimeError, which a CPU that is out of memory raises


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Have an error of the block that says that memory is out say what to do about it as well.

    Raises:
        OutOfMemory: a GPU or the CPU is out of memory.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemory):
            raise
        raise OutOfMemory(f"{advice()}\n{str(error).strip()}") from error


class OutOfMemory(torch.OutOfMemoryError, MemoryError):
    """Out of memory, with what to do about it."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the memory of a GPU or of the CPU is out."""
    return isinstance(error, torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error)


def training_advice(args: QuietStarArguments, grid: ThoughtGrid, at_once: int | None) -> str:
    """What to lower where a training step does not fit: first what leaves every update as it is.

    Args:
        args: the settings of the run.
        grid: that of a row.
        at_once: tokens of a grid that are read at once; None for all.
    """
    rows, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    tokens = rows * grid.row_tokens(args.positions_per_row)
    held = min(tokens, at_once or tokens)
    same, other = [], []
    if rows > 1:
        fewer = max(part for part in range(1, rows) if rows % part == 0)
        same.append(
            f"per_device_train_batch_size={fewer} with gradient_accumulation_steps={rows * steps // fewer} "
            f"(now {rows} and {steps})"
        )
    if not args.gradient_checkpointing:
        same.append("gradient_checkpointing=True")
    same.append(f"max_grid_tokens={held // 2} (a pass holds {held} tokens of text and thoughts)")
    if not (args.bf16 or args.fp16):
        other.append("bf16=True")
    if grid.rationales > 1:
        other.append(f"rationales={grid.rationales - 1} (now {grid.rationales})")
    if args.positions_per_row is not None and args.positions_per_row > 1:
        other.append(f"positions_per_row={args.positions_per_row // 2} (now {args.positions_per_row})")
    if grid.positions > 2:
        other.append(f"seq_length={max(grid.positions // 2, 2)} (now {grid.positions})")
    text = f"a training step does not fit in memory. These make the same updates: {'; '.join(same)}."
    return text + (f" These make others: {'; '.join(other)}." if other else "")


def inspection_advice(at_once: int | None) -> str:
    """What to lower where an inspection, which reads ``at_once`` tokens of a grid at a time, does not fit."""
    held = "all of a row" if at_once is None else at_once
    return (
        f"an inspection does not fit in memory: try a lower max_grid_tokens (now {held}), a lower seq_length or fewer "
        "rationales; inspect_steps=0 leaves it out"
    )


def evaluation_advice(args: QuietStarArguments) -> str:
    """What to lower where an evaluation does not fit."""
    rows = args.per_device_eval_batch_size
    if rows > 1:
        return f"the evaluation does not fit in memory: try per_device_eval_batch_size={rows // 2} (now {rows})"
    return f"the evaluation does not fit in memory, one row at a time: try a seq_length below {args.seq_length}"
