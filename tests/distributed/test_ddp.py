"""Two processes under DDP: the same thoughts and the same gradients as one process with the whole batch."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel

from qstar.learning import Objective

ROWS, LENGTH, RANKS = 4, 7, 2


def step(model, tokens, row_offset: int = 0):
    """A training step's thoughts, and every gradient."""
    output = model(tokens, objective=Objective(seed=11, row_offset=row_offset))
    output.loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.thoughts, gradients


def work(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    model = DistributedDataParallel(tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2))
    share = ROWS // RANKS
    part = tiny.text(ROWS, LENGTH)[rank * share : (rank + 1) * share]
    offset = rank * share * LENGTH * model.module.qstar.rationales
    torch.save(step(model, part, offset), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    """Rows of equal length, so that the mean over the processes is the mean over the rows."""
    multiprocessing.spawn(work, (str(tmp_path / "store"), str(tmp_path)), RANKS)
    thoughts, gradients = step(tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2), tiny.text(ROWS, LENGTH))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert torch.equal(torch.cat([drawn for drawn, _ in shares]), thoughts)
    for _, theirs in shares:
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
