"""Thinking: reading a text once, then advancing the thoughts at all of its positions together, one token at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from qstar.attention import Packed, Step, ThoughtCache
from qstar.capture import capture, check_capturable
from qstar.grid import Text, ThoughtGrid


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Hold ``model`` in ``eval()``: gradient checkpointing in ``train()`` would drop the cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def read_text(model: PreTrainedModel, text: Text, grid: ThoughtGrid) -> tuple[ThoughtCache, Tensor]:
    """Read a text without thoughts.

    Returns:
        A cache of its keys and values with room for the thoughts of ``grid``, and its hidden states ``[B, N, E]``.
    """
    cache = ThoughtCache(grid.rationales, grid.rationale_length)
    hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start), cache)
    return cache, hidden


def advance(model: PreTrainedModel, text: Text, cache: ThoughtCache, step: int | Tensor, tokens: Tensor) -> Tensor:
    """Read token ``step`` of every thought.

    Args:
        model: the model.
        text: the text that ``cache`` was filled from.
        cache: from :func:`read_text`; tokens 0 .. ``step - 1`` have been read.
        step: t, counted from the start token; or an int64 tensor ``[]`` on the device of ``tokens``, unchecked.
        tokens: ``[B, Nq, r]`` int64, at the last ``Nq`` positions of the text.

    Returns:
        Hidden states ``[B, Nq, r, E]``.
    """
    cache.begin_step(step)
    positions = text.positions[:, -tokens.shape[1] :, None] + 1 + step
    hidden = model.read(
        rearrange(tokens, "b n r -> b (n r)"),
        rearrange(positions.expand_as(tokens), "b n r -> b (n r)"),
        Step(cache, step, start=text.start),
        cache,
    )
    return rearrange(hidden, "b (n r) e -> b n r e", r=cache.rationales)


class Thinking:
    """Thoughts that grow by a token with every call, at all positions together.

    What changes from token to token, the step and the tokens, lies on the device and is written in place: every call
    launches the same, and the host asks for nothing. So a call can be captured and replayed.

    Attributes:
        thoughts: the tokens sampled so far, ``[B, Nq, r, K]`` int64.
    """

    def __init__(self, model: PreTrainedModel, text: Text, grid: ThoughtGrid, positions: int, **sampling: int | float):
        shape = len(text.tokens), positions, grid.rationales
        self.model, self.text, self.sampling = model, text, sampling
        self.head = model.language_head()
        self.cache, _ = read_text(model, text, grid)
        self.thoughts = text.tokens.new_empty(*shape, grid.thought_tokens)
        self.tokens = text.tokens.new_full(shape, model.qstar.start_token_id)
        self.step = text.tokens.new_zeros(())

    def __call__(self) -> None:
        hidden = advance(self.model, self.text, self.cache, self.step, self.tokens)
        tokens = self.head.sample(hidden.flatten(0, 2), step=self.step, **self.sampling)
        self.tokens.copy_(tokens.view_as(self.tokens))
        self.thoughts.index_copy_(-1, self.step[None], self.tokens[..., None])
        self.step += 1


@torch.no_grad()
def think(
    model: PreTrainedModel,
    text: Text,
    grid: ThoughtGrid,
    *,
    temperature: float,
    seed: int = 0,
    row_offset: int = 0,
    last: int | None = None,
    cuda_graph: bool = False,
) -> Tensor:
    """Sample a thought for every rationale at every position (paper, section 4.2).

    Args:
        model: the model; thoughts are sampled in ``eval()``.
        text: the text to think about.
        grid: how many rationales of how many tokens.
        temperature: of the distribution that tokens are drawn from; 0 takes the most probable token.
        seed: the same seed gives the same thoughts.
        row_offset: rows (batch, position, rationale) that other processes or batches have before these.
        last: think at the last ``Nq`` positions only; at all of them by default.
        cuda_graph: capture the second token in a CUDA graph and replay it for those after it, the same thoughts. Takes
            memory for one more token, which stays the model's, and the host's time for one. What it gains was not
            measured yet.

    Returns:
        Sampled tokens ``[B, Nq, r, K]`` int64; the start and end tokens are never among them.

    Raises:
        ValueError: ``cuda_graph`` where thinking cannot be captured: not on a GPU, parameters elsewhere or sharded,
            several processes, a model that waits for the device.
    """
    device = text.tokens.device
    if cuda_graph:
        check_capturable(model, device)
    positions = text.tokens.shape[1] if last is None else last
    sampling = dict(temperature=temperature, seed=seed, row_offset=row_offset)
    with evaluating(model):
        thinking = say_next = Thinking(model, text, grid, positions, **sampling)
        for token in range(grid.thought_tokens):
            if token == 1 and cuda_graph:
                say_next = capture(thinking, model, device)
            say_next()
    return thinking.thoughts


def read_grid(model: PreTrainedModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, backend: str = "auto") -> Tensor:
    """One packed pass over text and thoughts: hidden states ``[B, N*C, E]`` from thoughts ``[B, N, r, K]``."""
    tokens = grid.tokens(text.tokens, thoughts, model.qstar.start_token_id, model.qstar.end_token_id)
    layout = Packed(grid.slots, grid.rationales, start=text.start, backend=backend)
    return model.read(tokens, grid.position_ids(text.positions), layout)


@torch.no_grad()
def speak(model: PreTrainedModel, text: Text, grid: ThoughtGrid, thoughts: Tensor) -> tuple[Tensor, Tensor]:
    """Read given thoughts ``[B, Nq, r, K]`` at the last positions of a text, to its end token.

    Returns:
        States that predict the next token: without a thought ``[B, Nq, E]``, and mixed with what each thought leads to
        ``[B, Nq, r, E]``.
    """
    with evaluating(model):
        cache, hidden = read_text(model, text, grid)
        base = hidden[:, -thoughts.shape[1] :]
        edge = torch.full_like(thoughts[..., :1], model.qstar.start_token_id)
        tokens = torch.cat([edge, thoughts, torch.full_like(edge, model.qstar.end_token_id)], dim=-1)
        for step in range(tokens.shape[-1]):
            after = advance(model, text, cache, step, tokens[..., step])
    index = torch.arange(base.shape[:2].numel(), device=base.device).repeat_interleave(grid.rationales)
    mixed, _ = model.qstar_mixing_head(base.flatten(0, 1), after.flatten(0, 2), index, sigmoid=model.qstar.sigmoid)
    return base, mixed.view_as(after)
