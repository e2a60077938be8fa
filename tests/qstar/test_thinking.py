"""Thinking: the cached path against the packed pass, seeds, and what may be said."""

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

from qstar import reference
from qstar.evaluation.held_out import evaluate_rows
from qstar.experimental import cuda_graph
from qstar.experimental.cuda_graph import check_capturable
from qstar.grid import Text
from qstar.learning import Objective
from qstar.talking import talk
from qstar.thinking import Thinking, advance, read_text, think
from qstar_kernels import thought_attention_step


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2"])
def test_forced_thought_step_by_step_gives_the_packed_talk(family):
    """The cached path with a forced thought gives the talk log-probabilities of the packed pass."""
    model = tiny.thinking_model(family, thought_tokens=3, ahead_tokens=3, rationales=1)
    text, grid = Text.from_inputs(tiny.text(2, 8)), model.grid(8)
    thoughts = tiny.random_thoughts(model, 2, 8)
    packed = talk(model, text, grid, thoughts)
    rows = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    rows = rows.unflatten(1, (8, grid.slots))
    reading = read_text(model, text, grid)
    for step in range(grid.rationale_length):
        states = advance(model, reading, step, rows[:, :, 1 + step, None])[:, :, 0]
        k = step - grid.thought_tokens - 1
        if k < 0:
            continue
        count = 8 - 1 - k
        u, g = reading.hidden[:, k : k + count], states[:, :count]
        head = model.qstar_mixing_head
        w = head.output(torch.relu(head.hidden(torch.relu(head.input(torch.cat([u, g], dim=-1))))))
        mixed = reference.logits(model, u + w * (g - u)).log_softmax(-1)
        expected = mixed.gather(-1, text.tokens[:, k + 1 :, None])[..., 0]
        torch.testing.assert_close(packed.log_talk[:, :count, 0, k], expected, rtol=1e-5, atol=1e-5)


def test_sampling_follows_the_seed_alone():
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(4, 6)), model.grid(6)
    whole = think(model, text, grid, temperature=1.0, seed=7)
    assert torch.equal(whole, think(model, text, grid, temperature=1.0, seed=7))
    assert not torch.equal(whole, think(model, text, grid, temperature=1.0, seed=8))
    assert not torch.equal(whole[:, :, 0], whole[:, :, 1])


def test_processes_that_share_a_batch_draw_what_one_draws():
    model = tiny.thinking_model(thought_tokens=4, ahead_tokens=1)
    tokens, grid = tiny.text(4, 6), model.grid(6)
    whole = think(model, Text.from_inputs(tokens), grid, temperature=1.0, seed=7)
    rows = 2 * 6 * grid.rationales
    for rank in range(2):
        part = Text.from_inputs(tokens[2 * rank : 2 * rank + 2])
        mine = think(model, part, grid, temperature=1.0, seed=7, row_offset=rank * rows)
        assert torch.equal(mine, whole[2 * rank : 2 * rank + 2])


def test_greedy_thoughts_take_the_most_probable_token():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1, rationales=1)
    text, grid = Text.from_inputs(tiny.text(2, 6)), model.grid(6)
    thoughts = think(model, text, grid, temperature=0.0)
    policy = talk(model, text, grid, thoughts).policy
    assert torch.equal(thoughts, reference.logits(model, policy).argmax(-1))


def test_thought_tokens_are_never_said():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[[model.qstar.start_token_id, model.qstar.end_token_id]] *= 100
    text = Text.from_inputs(tiny.text(2, 6))
    for temperature in (0.0, 1.0):
        thoughts = think(model, text, model.grid(6), temperature=temperature)
        assert not torch.isin(thoughts, model.language_head().forbidden).any()


def test_thinking_leaves_the_mode_alone_and_works_with_checkpointing():
    model = tiny.thinking_model(thought_tokens=3, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(2, 6)), model.grid(6)
    expected = think(model, text, grid, temperature=0.0)
    model.gradient_checkpointing_enable()
    model.train()
    assert torch.equal(think(model, text, grid, temperature=0.0), expected)
    assert model.training


def test_the_cache_refuses_a_step_beyond_its_end():
    model = tiny.thinking_model(thought_tokens=2, ahead_tokens=1)
    text, grid = Text.from_inputs(tiny.text(1, 3)), model.grid(3)
    reading = read_text(model, text, grid)
    with pytest.raises(ValueError, match=r"step is 4, but it must be in 0\.\.3"):
        advance(model, reading, 4, torch.zeros(1, 3, 2, dtype=torch.int64))


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
