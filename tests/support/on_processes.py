"""Tests in several processes, which talk to each other by gloo."""

from __future__ import annotations

import os
import socket
import time

import pytest
import torch
from torch import distributed, multiprocessing

RANKS = 2
# Imported once, by the server that the processes are forked from: each of them would take seconds over it.
IMPORTED = ["qstar.training.run", "transformers.models.llama.modeling_llama"]


def on_every_rank(worker, *arguments: object) -> None:
    """Run ``worker(rank, *arguments)`` in ``RANKS`` processes, for five minutes at most."""
    multiprocessing.set_forkserver_preload(IMPORTED)
    context = multiprocessing.start_processes(worker, arguments, RANKS, join=False, start_method="forkserver")
    deadline = time.monotonic() + 300
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes did not end")


def free_port() -> int:
    """A port at which the processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def meet(rank: int, port: int) -> None:
    """Say to torch and accelerate, as torchrun does, which of the processes this one is."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def leave() -> None:
    """End this process at once: gloo's destructor may wait for a thread that waits for Python's lock."""
    distributed.barrier()
    os._exit(0)
