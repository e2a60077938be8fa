"""Two processes under DDP: the same thoughts and the same gradients as one process with the whole batch."""

from __future__ import annotations

import pytest
import tiny
import torch
from datasets import IterableDataset
from on_processes import RANKS, free_port, leave, meet, on_every_rank
from tiny_runs import unequal_rows
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from qstar.learning import Objective
from qstar.training.settings import QuietStarArguments
from qstar.training.trainer import QuietStarTrainer

ROWS, LENGTH = 4, 7


def step(model, tokens, row_offset: int = 0):
    """A training step's thoughts, and every gradient."""
    output = model(tokens, objective=Objective(seed=11, row_offset=row_offset))
    output.loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.thoughts, gradients


def trained(folder: str, world_size: int, streamed: bool) -> dict[str, torch.Tensor]:
    """The weights after two updates of four rows that are learned from to very different extents, and an evaluation."""
    rows = unequal_rows()
    options = dict(max_steps=2, warmup_steps=0, optim="sgd", learning_rate=0.1, max_grad_norm=1e9, save_strategy="no")
    quiet = dict(report_to="none", disable_tqdm=True, sample_steps=0, gradient_norm_steps=0, use_cpu=True)
    batch = dict(per_device_train_batch_size=4 // world_size, train_sampling_strategy="sequential", seq_length=12)
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    args = QuietStarArguments(folder, **options, **quiet, **batch)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = QuietStarTrainer(model, args, train_dataset=stream if streamed else rows)
    trainer.train()
    # An odd number of rows, one of them short: each must count once.
    found = trainer.evaluate([*rows[:2], {name: values[:5] for name, values in rows[3].items()}])
    return model.state_dict() | {name: torch.tensor(found[f"eval_{name}"]) for name in ("tokens", "nll_talk")}


def train_elsewhere(rank: int, port: int, results: str, streamed: bool) -> None:
    meet(rank, port)
    torch.save(trained(f"{results}/run", RANKS, streamed), f"{results}/{rank}.pt")
    assert distributed.get_world_size() == RANKS
    leave()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_the_trainer_makes_the_same_updates_on_two_processes(streamed, tmp_path):
    """Though one of them learns from other numbers of tokens than the other."""
    on_every_rank(train_elsewhere, free_port(), str(tmp_path), streamed)
    whole = trained(str(tmp_path / "alone"), 1, streamed)
    start = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2).state_dict()
    for rank in range(RANKS):
        split = torch.load(tmp_path / f"{rank}.pt")
        for name in ("tokens", "nll_talk"):
            torch.testing.assert_close(split.pop(name), whole[name], rtol=1e-5, atol=0)
        for name, weight in split.items():
            assert (whole[name] - weight).norm() <= 1e-4 * (weight - start[name]).norm(), name


def work(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    model = DistributedDataParallel(tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2))
    share = ROWS // RANKS
    part = tiny.text(ROWS, LENGTH)[rank * share : (rank + 1) * share]
    offset = rank * share * LENGTH * model.module.qstar.rationales
    torch.save(step(model, part, offset), f"{results}/{rank}.pt")
    leave()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    """Rows of equal length, so that the mean over the processes is the mean over the rows."""
    on_every_rank(work, str(tmp_path / "store"), str(tmp_path))
    thoughts, gradients = step(tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2), tiny.text(ROWS, LENGTH))
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert torch.equal(torch.cat([drawn for drawn, _ in shares]), thoughts)
    for _, theirs in shares:
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
