"""A limit of time that is kept: nothing is begun that cannot end before it, and training stops at a step."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

WARM_UP = 3  # first steps, which say little of how long one takes
ENOUGH = 10  # steps after which it is known how long the rest takes


class OutOfTime(Exception):
    """What was asked for cannot end before the deadline; what is there stays."""


class Deadline:
    """Some seconds from now, in this process and in others that it is given to; without a limit there is always time.

    Raises:
        ValueError: ``seconds`` is below 0.
    """

    def __init__(self, seconds: float | None):
        if seconds is not None and seconds < 0:
            raise ValueError(f"the limit of time is {seconds:g} s, but it must be at least 0")
        self.end = None if seconds is None else time.time() + seconds

    def left(self) -> float:
        """Seconds that are left, below 0 behind the deadline; infinite without one."""
        return float("inf") if self.end is None else self.end - time.time()

    def check(self, what: str, seconds: float = 0.0) -> None:
        """Raise OutOfTime where ``seconds`` more would end behind the deadline."""
        if self.left() <= seconds:
            raise OutOfTime(f"{what} takes about {seconds:.0f} s, but {max(self.left(), 0):.0f} s are left")


class StopInTime(TrainerCallback):
    """Stops training at the deadline, with a checkpoint; without checkpoints already where it would end behind it."""

    def __init__(self, deadline: Deadline):
        self.deadline, self.steps, self.began = deadline, 0, 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop where it is time."""
        self.steps += 1
        if self.steps == WARM_UP:
            self.began = time.monotonic()
        keeps = args.save_strategy != "no"
        left = self.deadline.left()
        further = 0.0
        if not keeps and self.steps >= ENOUGH:
            further = (time.monotonic() - self.began) / (self.steps - WARM_UP) * (state.max_steps - state.global_step)
        if left <= further and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = keeps
