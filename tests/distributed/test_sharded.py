"""Two processes that share weights, gradients or the optimizer make the updates of one process with the whole batch.

FSDP2 and DeepSpeed as accelerate sets them up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from on_processes import RANKS, free_port, leave, meet, on_every_rank
from sharded_runs import ROWS, a_trainer
from tiny_runs import records, unequal_rows

from qstar import load
from qstar.inspection.data import Inspection

UNTIED_AND_TIED = ["llama", "gpt2"]
FAMILIES = [["llama", "gpt2", "mistral"], ["gemma2", "gemma3", "gpt_neox"], ["deepseek_v3", "gpt_oss", "opt"]]
SAME = (
    "loss",
    "grad_norm",
    "policy_loss",
    "nll_base",
    "nll_talk",
    "reward",
    "rewarded",
    "mixing_weight",
    "policy_entropy",
)
SAME += ("divergence", "stage", "learning_rate")
SAME_HELD_OUT = ("eval_tokens", "eval_nll_base", "eval_nll_talk", "eval_mixing_weight")
GRID_IN_PARTS = dict(max_grid_tokens=50, seq_length=12)
STAGES = dict(
    stages=[dict(steps=1), dict(steps=1, ahead_tokens=1, learning_rate=0.05), dict(steps=1, distil=True)],
    entropy_weight=0.1,
)
SOME_POSITIONS = dict(positions_per_row=5, seq_length=12)
# Batches of one row, and checkpointing.
IN_PARTS = dict(activation_checkpointing=True, per_device_train_batch_size=1, gradient_accumulation_steps=2)


def trained(folder: Path, family: str, kind: str, settings: dict) -> list[torch.Tensor]:
    """The thoughts of all batches of a run, which evaluates at its end."""
    trainer = a_trainer(folder, family, kind, inspect_steps=3, inspect_tokens=24, **settings)
    trainer.train()
    # An odd number of rows, one of them short: each must count once.
    trainer.evaluate([*unequal_rows()[:2], {name: values[:5] for name, values in unequal_rows()[3].items()}])
    # One process has no row at all.
    trainer.evaluate(unequal_rows()[1:2])
    trainer.save_model()
    return trainer.thoughts


def train_in_parts(rank: int, port: int, folder: Path, families: list[str], kind: str, settings: dict) -> None:
    meet(rank, port)
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    for family in families:
        torch.save(trained(folder / family, family, kind, settings), folder / f"{family}-{rank}.pt")
    leave()


def check_like_one_process(folder: Path, families: list[str], kind: str, settings: dict) -> None:
    """The same loss, gradient norm and thoughts in every step, the same evaluations, the same weights at last."""
    on_every_rank(train_in_parts, free_port(), folder, families, kind, settings)
    one_batch = settings | dict(per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, max_grid_tokens=0)
    for family in families:
        alone = trained(folder / "alone" / family, family, "alone", one_batch)
        found, expected = records(folder / family), records(folder / "alone" / family)
        assert len(found) == len(expected) == one_batch.get("max_steps", 3) + 3
        for two, one in zip(found, expected, strict=True):
            names = [name for name in SAME + SAME_HELD_OUT if name in one]
            assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)
        shares = [torch.load(folder / f"{family}-{rank}.pt") for rank in range(RANKS)]
        drawn = [batch for batches in zip(*shares, strict=True) for batch in batches]
        assert torch.equal(torch.cat(drawn), torch.cat(alone))
        shown = [inspected(each / family) for each in (folder, folder / "alone")]
        assert len(shown[0]) == 2, "before the first step and after the last"
        for two, one in zip(*shown, strict=True):
            check_same_inspection(two, one)
        model, whole = load(folder / family)[0], load(folder / "alone" / family)[0]
        for name, weight in whole.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-5, atol=1e-6, msg=name)


def inspected(run: Path) -> list[Inspection]:
    return [Inspection.from_json(path.read_text()) for path in sorted((run / "inspections").glob("*.json"))]


def check_same_inspection(two: Inspection, one: Inspection) -> None:
    for ours, theirs in zip(two.documents, one.documents, strict=True):
        assert ours.token_ids == theirs.token_ids
        for mine, its in zip(ours.positions, theirs.positions, strict=True):
            assert [each.token_ids for each in mine.rationales] == [each.token_ids for each in its.rationales]
            assert mine.gain_ahead == pytest.approx(its.gain_ahead, abs=1e-5)
            assert mine.weight == pytest.approx(its.weight, abs=1e-5)
    found, expected = (each.summary.controls for each in (two, one))
    gains = {name: control.gain.mean for name, control in expected.items()}
    assert {name: control.gain.mean for name, control in found.items()} == pytest.approx(gains, abs=1e-5)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("families", "settings"),
    [
        pytest.param(UNTIED_AND_TIED, {}, id="plain"),
        *(pytest.param(each, IN_PARTS, id=f"in-parts-{'-'.join(each)}", marks=pytest.mark.slow) for each in FAMILIES),
        pytest.param(["llama"], dict(streamed=True, max_steps=2), id="stream", marks=pytest.mark.slow),
        pytest.param(UNTIED_AND_TIED, STAGES, id="stages", marks=pytest.mark.slow),
        pytest.param(["llama"], GRID_IN_PARTS, id="grid-in-parts", marks=pytest.mark.slow),
        pytest.param(["gpt2"], GRID_IN_PARTS | IN_PARTS, id="grid-in-parts-checkpointed", marks=pytest.mark.slow),
        pytest.param(["llama"], SOME_POSITIONS, id="some-positions", marks=pytest.mark.slow),
        pytest.param(["gpt2"], GRID_IN_PARTS | SOME_POSITIONS, id="some-positions-in-parts", marks=pytest.mark.slow),
    ],
)
def test_two_processes_with_fsdp_make_the_updates_of_one(families, settings, tmp_path):
    check_like_one_process(tmp_path, families, "fsdp", settings)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("settings", [{}, IN_PARTS], ids=["plain", "in-parts"])
@pytest.mark.parametrize(("kind", "families"), [("zero2", UNTIED_AND_TIED), ("zero3", ["llama", "gpt_neox"])])
def test_two_processes_with_deepspeed_make_the_updates_of_one(kind, families, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_like_one_process(tmp_path, families, kind, settings)


def train_in_bfloat16(rank: int, port: int, folder: Path) -> None:
    meet(rank, port)
    a_trainer(folder, "llama", "fsdp", bf16=True).train()
    leave()


@pytest.mark.distributed
@pytest.mark.slow
def test_fsdp_in_bfloat16_rounds_weights_and_no_losses(tmp_path):
    on_every_rank(train_in_bfloat16, free_port(), tmp_path / "two")
    a_trainer(tmp_path / "one", "llama", bf16=True).train()
    two, one = records(tmp_path / "two")[0], records(tmp_path / "one")[0]
    for name in ("loss", "grad_norm", "nll_base", "nll_talk", "mixing_weight"):
        assert two[name] == pytest.approx(one[name], rel=2**-7)  # the spacing of bfloat16
        assert two[name] != torch.tensor(two[name]).bfloat16().item()


def train_with_a_loss_of_nan(rank: int, port: int, folder: Path) -> None:
    """One process alone finds it."""
    meet(rank, port)
    trainer = a_trainer(folder, "llama", "fsdp")
    if rank == 1:
        trainer.objective.policy_weight = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is not finite in step 1, one of") as found:
        trainer.train()
    (folder / f"{rank}.txt").write_text(str(found.value))
    leave()


@pytest.mark.distributed
@pytest.mark.slow
def test_all_processes_stop_at_a_loss_that_is_not_finite_in_one(tmp_path):
    on_every_rank(train_with_a_loss_of_nan, free_port(), tmp_path)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
