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
from qstar.training.thought_statistics import COLLAPSED
from qstar.training.trainer import QuietStarTrainer

ROWS, LENGTH = 4, 7
STAGES = [dict(steps=1, ahead_tokens=1), dict(steps=1, distil=True)]
LOGGED = ("eval_tokens", "eval_nll_talk", *COLLAPSED)


def step(model, tokens, row_offset: int = 0):
    """A training step's thoughts, and every gradient."""
    output = model(tokens, objective=Objective(seed=11, row_offset=row_offset))
    output.loss.backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.thoughts, gradients


def trained(
    folder: str,
    world_size: int,
    streamed: bool,
    at_once: int = 0,
    chosen: int | None = None,
    stages: list[dict] | None = None,
) -> dict[str, torch.Tensor]:
    """The weights after two updates of four rows that are learned from to very different extents, and an evaluation."""
    rows = unequal_rows()
    options = dict(max_steps=2, warmup_steps=0, optim="sgd", learning_rate=0.1, max_grad_norm=1e9, save_strategy="no")
    options |= dict(logging_steps=2)
    quiet = dict(report_to="none", disable_tqdm=True, sample_steps=0, gradient_norm_steps=0, use_cpu=True)
    batch = dict(per_device_train_batch_size=4 // world_size, train_sampling_strategy="sequential", seq_length=12)
    model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
    ours = dict(max_grid_tokens=at_once, positions_per_row=chosen, stages=stages)
    args = QuietStarArguments(folder, **options, **quiet, **batch, **ours)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = QuietStarTrainer(model, args, train_dataset=stream if streamed else rows)
    trainer.train()
    # An odd number of rows, one of them short: each must count once.
    found = trainer.evaluate([*rows[:2], {name: values[:5] for name, values in rows[3].items()}])
    found |= next(record for record in trainer.state.log_history if "loss" in record)
    return model.state_dict() | {name: torch.tensor(found[name]) for name in LOGGED}


def train_elsewhere(
    rank: int, port: int, results: str, streamed: bool, at_once: int, chosen: int | None, stages: list[dict] | None
) -> None:
    meet(rank, port)
    torch.save(trained(f"{results}/run", RANKS, streamed, at_once, chosen, stages), f"{results}/{rank}.pt")
    assert distributed.get_world_size() == RANKS
    leave()


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("streamed", "at_once", "chosen", "stages"),
    [
        (False, 0, None, None),
        (True, 0, None, None),
        (False, 50, None, None),
        (False, 0, 4, None),
        (False, 50, 4, None),
        (False, 0, None, STAGES),
        (False, 0, 4, STAGES),
    ],
    ids=["rows", "stream", "parts", "some positions", "parts of some positions", "stages", "stages of some positions"],
)
def test_the_trainer_makes_the_same_updates_on_two_processes(streamed, at_once, chosen, stages, tmp_path):
    """Though one of them learns from other numbers of tokens than the other, and from grids in more parts."""
    on_every_rank(train_elsewhere, free_port(), str(tmp_path), streamed, at_once, chosen, stages)
    whole = trained(str(tmp_path / "alone"), 1, streamed, chosen=chosen, stages=stages)
    start = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2).state_dict()
    for rank in range(RANKS):
        split = torch.load(tmp_path / f"{rank}.pt")
        for name in LOGGED:
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


class SpoiledElsewhere(QuietStarTrainer):
    """Finds the loss of the second update infinite on one of the processes, though no gradient there is."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + float("inf") if self.args.process_index == 1 and self.state.global_step == 1 else loss


def train_until_it_is_spoiled(rank: int, port: int, results: str) -> None:
    meet(rank, port)
    quiet = dict(report_to="none", disable_tqdm=True, sample_steps=1, gradient_norm_steps=0, use_cpu=True)
    options = quiet | dict(per_device_train_batch_size=2, warmup_steps=0, learning_rate=1e-2, save_strategy="no")
    found: dict[str, object] = {}
    for policy, steps in (("skip", 2), ("stop", 2), ("skip", 1)):
        model = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2)
        args = QuietStarArguments(f"{results}/{policy}", on_nonfinite=policy, max_steps=steps, **options)
        trainer = SpoiledElsewhere(model, args, train_dataset=unequal_rows(), processing_class=tiny.tokenizer())
        try:
            trainer.train()
        except FloatingPointError as error:
            found["said"] = str(error)
        found[f"{policy} {steps}"] = model.state_dict()
    torch.save(found, f"{results}/{rank}.pt")
    leave()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_agree_on_an_update_that_is_not_finite_for_one_of_them(tmp_path):
    """Both stop, and say the same, or both skip it: the weights are those of the first update. One shows thoughts."""
    on_every_rank(train_until_it_is_spoiled, free_port(), str(tmp_path))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    start = tiny.thinking_model("llama", thought_tokens=2, ahead_tokens=2).state_dict()
    for found in ranks:
        assert found["said"].startswith("the loss is not finite in step 2: training stops before the weights change")
        for name, weight in ranks[0]["skip 1"].items():
            assert torch.equal(found["skip 2"][name], weight), name
            assert torch.equal(found["stop 2"][name], weight), name
        assert not torch.equal(found["skip 1"]["lm_head.weight"], start["lm_head.weight"])
    for policy in ("skip", "stop"):
        assert [path.name for path in (tmp_path / policy / "thoughts").iterdir()] == ["step-000000.parquet"]
