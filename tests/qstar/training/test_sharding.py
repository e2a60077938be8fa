"""Parts of tensors become whole ones, and whole ones the parts that they were."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qstar.training.sharding import optimizer_parts, part, whole, whole_state


@pytest.fixture
def sharded(tmp_path):
    """A layer, sharded among the processes that there are: one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    torch.manual_seed(0)
    yield fully_shard(nn.Linear(3, 5))
    distributed.destroy_process_group()


def stepped(layer: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_weights_become_whole_and_parts_again(sharded):
    state = whole({"layer": [sharded.state_dict(), 3]}, keep=True)
    assert state["layer"][1] == 3
    for name, like in sharded.state_dict().items():
        weight = state["layer"][0][name]
        assert type(weight) is torch.Tensor and torch.equal(weight, like.full_tensor())
        again = part(weight, like)
        assert isinstance(again, DTensor) and again.placements == like.placements
        assert torch.equal(again.to_local(), like.to_local())
    assert all(weight.numel() == 0 for weight in whole(sharded.state_dict(), keep=False).values())


def test_the_state_of_an_optimizer_becomes_whole_and_parts_again(sharded):
    optimizer = stepped(sharded)
    saved = whole_state(optimizer, keep=True)
    assert all(type(value) is torch.Tensor for values in saved["state"].values() for value in values.values())
    other = torch.optim.AdamW(sharded.parameters(), lr=1.0)
    other.load_state_dict(optimizer_parts(saved, other))
    assert other.param_groups[0]["lr"] == 0.1
    for parameter in sharded.parameters():
        for name, value in optimizer.state[parameter].items():
            again = other.state[parameter][name]
            assert type(again) is type(value)
            assert torch.equal(whole(again, keep=True), whole(value, keep=True))


def test_a_state_that_no_process_has_whole_is_refused(sharded):
    optimizer = stepped(sharded)
    optimizer.state[sharded.bias]["absmax"] = torch.zeros(2)
    with pytest.raises(ValueError, match="optim keeps a state 'absmax' that is not sharded as its parameter is"):
        whole_state(optimizer, keep=True)
