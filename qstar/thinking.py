"""Think, the first of the paper's three steps: at every position of a text, sample thoughts of K tokens.

The text is read once; then the thoughts at all of its positions, or at those that :func:`choose_positions` draws,
advance together, one token at a time. ``talking.py`` goes on from here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.profiler import record_function

from qstar.cache import ThoughtCache
from qstar.grid import IGNORED, Text, ThoughtGrid
from qstar.layouts import Extension, Packed, Step
from qstar.model import QuietStarModel
from qstar_kernels import row_uniforms

DRAW_OF_POSITIONS = 2**32  # a step of the random numbers beyond those of any thought's tokens


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold ``model`` in ``eval()``: gradient checkpointing in ``train()`` would drop the cache."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True)
class Reading:
    """A text that has been read without thoughts, and has room for them.

    Attributes:
        text: what was read, ``[B, N]``.
        cache: its keys and values.
        hidden: states that predict the next token, ``[B, N, E]``.
    """

    text: Text
    cache: ThoughtCache
    hidden: Tensor

    def check_current(self) -> int:
        """N; raises ValueError where the cache has gone on into another reading."""
        read, cached = self.hidden.shape[1], self.cache.text_length
        if read != cached:
            raise ValueError(f"reading is of {read} tokens, but its cache has gone on to {cached}: take the later one")
        return read


def read_text(model: QuietStarModel, text: Text, grid: ThoughtGrid) -> Reading:
    """Read a text without thoughts, into a cache that has room for the thoughts of ``grid``."""
    model.check_rotary_factors(text.positions, grid.rationale_length)
    cache = ThoughtCache(grid.rationales, grid.rationale_length)
    hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start, cache=cache))
    return Reading(text, cache, hidden)


def read_on(model: QuietStarModel, reading: Reading, text: Text) -> Reading:
    """Read the rest of ``text``, which begins with the text of ``reading``; thoughts about that are dropped.

    The cache goes on into the new reading, so that ``reading`` must not be used any more.

    Raises:
        ValueError: ``text`` holds no more tokens than have been read, or more than the model knows; ``reading`` was
            used up before.
    """
    read = reading.check_current()
    if text.tokens.shape[1] <= read:
        raise ValueError(f"text has {text.tokens.shape[1]} tokens, but it must have more than the {read} read so far")
    further = reading.cache.rationale_length
    model.check_length(text.tokens.shape[1], further)
    model.check_rotary_factors(reading.text.positions, further, text.positions)
    reading.cache.drop_thoughts()
    layout = Extension(reading.cache, start=text.start)
    hidden = model.read(text.tokens[:, read:], text.positions[:, read:], layout)
    return Reading(text, reading.cache, torch.cat([reading.hidden, hidden], dim=1))


def choose_positions(text: Text, grid: ThoughtGrid, count: int, seed: int = 0, row_offset: int = 0) -> ThoughtGrid:
    """The grid with thoughts at ``count`` random positions of each row, or at all where it has no more.

    They are drawn without replacement, each as likely as any other, from the positions all of whose ``m`` tokens ahead
    count. In a row that has fewer of these, all of them are chosen, and others at random beside them: rows of a batch
    have equally many, and others count as far as they do where all are chosen. ``seed`` and ``row_offset`` are as for
    :func:`think`: a position's draw does not depend on which rows are in the batch.
    """
    if count >= grid.positions:
        return grid
    whole = (text.talk_targets(grid) != IGNORED).all(-1)
    draw, _ = row_uniforms(seed, DRAW_OF_POSITIONS, thought_rows(text, grid, row_offset)[..., 0].flatten())
    order = torch.where(whole, draw.view_as(whole), 1 + draw.view_as(whole)).argsort(dim=1, stable=True)
    return replace(grid, chosen=order[:, :count].sort(dim=1).values)


def thought_rows(text: Text, grid: ThoughtGrid, row_offset: int) -> Tensor:
    """The numbers ``[B, n, r]`` int64 of the thoughts among all rows, the same whether all positions think or some."""
    batch, length = text.tokens.shape
    cells = grid.at_chosen(torch.arange(batch * length, device=text.tokens.device).view(batch, length))
    rationale = torch.arange(grid.rationales, device=cells.device)
    return row_offset + cells[..., None] * grid.rationales + rationale


def advance(
    model: QuietStarModel, reading: Reading, step: int | Tensor, tokens: Tensor, at: Tensor | None = None
) -> Tensor:
    """Read token ``step`` of every thought.

    Args:
        model: the model.
        reading: of the text; tokens 0 .. ``step - 1`` have been read into its cache.
        step: t, counted from the start token; or an int64 tensor ``[]`` on the device of ``tokens``, unchecked.
        tokens: ``[B, Nq, r]`` int64.
        at: the positions of the text that they stand at, ``[B, Nq]`` int64; the last ones by default.

    Returns:
        Hidden states ``[B, Nq, r, E]``.

    Raises:
        ValueError: ``step`` is not one of a rationale's tokens; ``reading`` was used up before.
    """
    text, cache = reading.text, reading.cache
    reading.check_current()
    if not isinstance(step, Tensor) and not 0 <= step < cache.rationale_length:
        raise ValueError(f"step is {step}, but it must be in 0..{cache.rationale_length - 1}")
    here = text.positions[:, -tokens.shape[1] :] if at is None else text.positions.gather(1, at)
    positions = here[..., None] + 1 + step
    hidden = model.read(
        rearrange(tokens, "b n r -> b (n r)"),
        rearrange(positions.expand_as(tokens), "b n r -> b (n r)"),
        Step(cache, step, start=text.start, at=at),
    )
    return rearrange(hidden, "b (n r) e -> b n r e", r=cache.rationales)


class Thinking:
    """Thoughts that grow by a token with every call, at all their positions together.

    What changes from token to token, the step and the tokens, lies on the device and is written in place: every call
    launches the same, and the host asks for nothing. So a call can be captured and replayed.

    Attributes:
        thoughts: the tokens sampled so far, ``[B, Nq, r, K]`` int64.
    """

    def __init__(self, model: QuietStarModel, reading: Reading, grid: ThoughtGrid, positions: int, **sampling: Any):
        tokens = reading.text.tokens
        shape = len(tokens), positions, grid.rationales
        self.model, self.reading, self.at, self.sampling = model, reading, grid.chosen, sampling
        reading.cache.drop_thoughts()
        self.head = model.language_head()
        self.thoughts = tokens.new_empty(*shape, grid.thought_tokens)
        self.tokens = tokens.new_full(shape, model.qstar.start_token_id)
        self.step = tokens.new_zeros(())

    def __call__(self) -> None:
        hidden = advance(self.model, self.reading, self.step, self.tokens, self.at)
        tokens = self.model.next_of_thoughts(self.head, hidden.flatten(0, 2), step=self.step, **self.sampling)
        self.tokens.copy_(tokens.view_as(self.tokens))
        self.thoughts.index_copy_(-1, self.step[None], self.tokens[..., None])
        self.step += 1


@torch.no_grad()
def think(
    model: QuietStarModel,
    text: Text,
    grid: ThoughtGrid,
    *,
    temperature: float,
    seed: int = 0,
    row_offset: int = 0,
    rows: Tensor | None = None,
    last: int | None = None,
    reading: Reading | None = None,
) -> Tensor:
    """Sample a thought for every rationale at every position of the grid that has some (paper, section 4.2).

    Args:
        model: the model; thoughts are sampled in ``eval()``.
        text: the text to think about.
        grid: how many rationales of how many tokens, and where. The thoughts at chosen positions are those that all
            positions would have there.
        temperature: of the distribution that tokens are drawn from; 0 takes the most probable token.
        seed: the same seed gives the same thoughts.
        row_offset: rows (batch, position, rationale) that other processes or batches have before these.
        rows: numbers of the rows themselves, ``[B, Nq, r]`` int64, where they are not counted from ``row_offset`` on.
        last: think at the last ``Nq`` positions only; at all of the grid's by default.
        reading: of ``text``, from :func:`read_text` with this ``grid``; its cache then holds these thoughts but for
            their last token, and none from before. By default the text is read here.

    Returns:
        Sampled tokens ``[B, Nq, r, K]`` int64; the start and end tokens are never among them, but where all are pauses.

    Raises:
        ValueError: ``last`` is not a number of positions of the text, or is given beside chosen ones; ``reading`` is of
            another text or has another room for thoughts.
    """
    length = text.tokens.shape[1]
    if reading is not None:
        if reading.text is not text:
            raise ValueError("reading is of another text: give the text that it has read")
        room, asked = (
            (reading.cache.rationales, reading.cache.rationale_length),
            (grid.rationales, grid.rationale_length),
        )
        if room != asked:
            raise ValueError(f"reading has room for (r, T) = {room}, but grid asks for {asked}")
    if last is not None and not 1 <= last <= length:
        raise ValueError(f"last is {last}, but it must be in 1..{length}, the positions of the text")
    if last is not None and grid.chosen is not None:
        raise ValueError(f"last is {last}, but the grid has chosen positions: give one of them")
    count = grid.thought_positions if last is None else last
    if model.qstar.pauses and reading is None:  # no state is needed to know them
        shape = len(text.tokens), count, grid.rationales, grid.thought_tokens
        return text.tokens.new_full(shape, model.qstar.start_token_id)
    with record_function("qstar::think"), evaluating(model):
        if reading is None:
            reading = read_text(model, text, grid)
        if rows is None and grid.chosen is not None:
            rows = thought_rows(text, grid, row_offset)
        numbers: dict[str, Any] = dict(row_offset=row_offset) if rows is None else dict(rows=rows.flatten())
        sampling = dict(temperature=temperature, seed=seed, **numbers)
        thinking = Thinking(model, reading, grid, count, **sampling)
        say_next: Callable[[], None] = thinking
        for token in range(grid.thought_tokens):
            if token == 1 and model.qstar_replay is not None:
                say_next = model.qstar_replay(thinking)
            say_next()
    return thinking.thoughts
