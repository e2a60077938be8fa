"""Thinking that is replayed: the thoughts of every token in turn, and a refusal where it cannot be captured."""

from __future__ import annotations

from functools import partial
from unittest.mock import Mock

import pytest
import tiny
import torch
from tape import capture_on_tape
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from wait_watch import WaitWatch

from qstar.evaluation.held_out import evaluate_rows
from qstar.experimental import cuda_graph
from qstar.experimental.cuda_graph import check_capturable
from qstar.grid import Text
from qstar.learning import Objective
from qstar.thinking import Thinking, read_text, think
from qstar_kernels import thought_attention_step

pytestmark = pytest.mark.slow

WIDE = {"gpt2": dict(n_embd=64), "gpt_neox": dict(hidden_size=64)}  # heads that are wide enough for the kernels


def wide_model(family="llama", **settings):
    changes = WIDE.get(family, dict(hidden_size=64, head_dim=16))
    return tiny.thinking_model(family, changes=changes, ahead_tokens=1, **settings)


@pytest.fixture
def kernels(monkeypatch):
    """Attention and its cache as on a GPU, where the step stays on the device."""
    monkeypatch.setattr("qstar.cache.AT_HAND", ())
    pytest.importorskip("triton")
    on_device = partial(thought_attention_step, backend="triton")
    monkeypatch.setattr("qstar.layouts.thought_attention_step", on_device)


@pytest.fixture
def replays(monkeypatch):
    """A stand-in for the CUDA graph: the replays of every capture, which count their calls."""
    made = []

    def record(*arguments):
        made.append(Mock(side_effect=capture_on_tape(*arguments)))
        return made[-1]

    monkeypatch.setattr("qstar.experimental.cuda_graph.check_capturable", lambda model, device: None)
    monkeypatch.setattr("qstar.experimental.cuda_graph.capture", record)
    return made


@pytest.mark.parametrize(
    ("family", "temperature", "last"),
    [("gpt2", 1.0, None), ("llama", 0.0, 2), ("gemma2", 1.0, 2), ("gpt_oss", 1.0, None)],
)
def test_replayed_thoughts_are_those_of_every_token_in_turn(kernels, replays, family, temperature, last):
    """The host has its part in two tokens of four: nothing that it holds changes from token to token."""
    model = wide_model(family, thought_tokens=4)
    padding = torch.ones(2, 3, dtype=torch.int64)
    padding[1, 0] = 0
    text, grid = Text.from_inputs(tiny.text(2, 3), padding), model.grid(3)
    options = dict(temperature=temperature, seed=-3, row_offset=2**33, last=last)
    expected = think(model, text, grid, **options)
    assert not replays
    cuda_graph.enable(model)
    assert torch.equal(think(model, text, grid, **options), expected)
    assert [replay.call_count for replay in replays] == [3]


def test_replayed_thoughts_under_autocast(kernels, replays):
    model = wide_model(thought_tokens=3)
    text, grid = Text.from_inputs(tiny.text(1, 3)), model.grid(3)
    with torch.autocast("cpu", torch.bfloat16):
        expected = think(model, text, grid, temperature=1.0)
        cuda_graph.enable(model)
        assert torch.equal(think(model, text, grid, temperature=1.0), expected)
    assert [replay.call_count for replay in replays] == [2]


def test_what_is_captured_asks_for_nothing(kernels):
    model = wide_model(thought_tokens=3)
    text, grid = Text.from_inputs(tiny.text(1, 3)), model.grid(3)
    with torch.no_grad():
        say_next = Thinking(model, read_text(model, text, grid), grid, 3, temperature=1.0, seed=0, row_offset=0)
        say_next()
        with WaitWatch() as watch:
            say_next()
    assert watch.waits == []


class ElsewhereModel(torch.nn.Module):
    """Some of it on another device than the text."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.register_buffer("table", torch.zeros(2, device="meta"))


def test_a_graph_is_refused_where_it_cannot_be(monkeypatch):
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    text = Text.from_inputs(tiny.text(1, 3))
    cuda_graph.enable(model)
    why = "cuda_graph is enabled, but thinking cannot be captured: "
    with pytest.raises(ValueError, match=why + "the text is on cpu"):
        think(model, text, model.grid(3), temperature=1.0)
    with pytest.raises(ValueError, match=why + "the text is on cpu"):
        Objective()(model, text.tokens)
    with pytest.raises(ValueError, match=why + "the text is on cpu"):
        evaluate_rows(model, [dict(input_ids=text.tokens)])
    cuda_graph.disable(model)
    assert Objective()(model, text.tokens).loss.isfinite()
    here = torch.device("cuda", 0)
    with pytest.raises(ValueError, match=why + "layer.weight is on cpu, and the text on cuda:0"):
        check_capturable(ElsewhereModel(), here)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=why + "2 processes train together"):
        check_capturable(model, here)


def test_a_graph_of_sharded_parameters_is_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="parameters are sharded, and FSDP gathers them"):
            check_capturable(model, torch.device("cuda", 0))
    finally:
        torch.distributed.destroy_process_group()
