"""A run that is told to stop saves a checkpoint first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback


class StopWithCheckpoint(TrainerCallback):
    """Saves a checkpoint and ends the training after the step in which SIGINT (Ctrl-C) or SIGTERM arrives.

    A second such signal does at once what it would do without this. One that is ignored, as a shell's script has it for
    what it starts in the background, stays ignored.

    Attributes:
        received: the signal; 0 for none. Where there are several processes, what any of them received.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while the block runs; only the main thread of a process can."""
        if threading.current_thread() is threading.main_thread():
            for each in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(each) == signal.SIG_IGN:
                    continue
                handler = signal.signal(each, self._receive)
                self._before[each] = signal.SIG_DFL if handler is None else handler
        try:
            yield
        finally:
            self._let_go()

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        self._let_go()

    def _let_go(self) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            distributed.all_reduce(received, distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received:
            control.should_save = control.should_training_stop = True
