"""How probable each token of held-out text is, without thoughts and after a thought, so that tokens can be compared.

Where :mod:`qstar.evaluation.held_out` adds up, here every token stays: two models are compared token by token, and what
stands in the place of a model's own thoughts is given, as for answers (:mod:`qstar.evaluation.controls`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qstar.evaluation.scoring import OWN, Thoughts
from qstar.grid import IGNORED
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import read_batch, talk, text_log_prob
from qstar.thinking import evaluating, think


class TextScores(NamedTuple):
    """The T tokens of rows of text that are predicted, in their order; all on the CPU.

    Attributes:
        row: that each stands in, ``[T]`` int64.
        without: log-probability without a thought, ``[T]`` fp32 nats.
        after: log-probability after the thought at the position before it, ``[T]`` fp32 nats; None where the model did
            not think.
        thoughts: that were read at each token of a row, padding left out, ``[L, K]`` int64; empty where the model did
            not think.
    """

    row: Tensor
    without: Tensor
    after: Tensor | None
    thoughts: list[Tensor]


@torch.no_grad()
def score_text(
    model: QuietStarModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    thoughts: Thoughts = OWN,
    temperature: float = 0.0,
    seed: int = 0,
    max_grid_tokens: int | None = None,
) -> TextScores:
    """Score every token of text, with one thought at each.

    Args:
        model: from :func:`qstar.wrap` or :func:`qstar.load`.
        batches: as :class:`qstar.data.PadRight` makes them.
        thoughts: ``"own"``: the model's; or those to read instead, for each row ``[L, K]`` int64 with L its tokens
            without padding; None: it does not think.
        temperature: its own are sampled at; greedy by default.
        seed: of sampled thoughts.
        max_grid_tokens: tokens of the grid that are read at once, see :func:`qstar.talking.read_grid`.

    Raises:
        ValueError: given thoughts are not ``[L, K]`` for each row, or not as many as rows.
    """
    device = embedding_rows(model).device
    rows: list[Tensor] = []
    without: list[Tensor] = []
    after: list[Tensor] = []
    read: list[Tensor] = []
    positions = begin = 0  # that were read in earlier batches, and their rows
    with evaluating(model):
        for batch in batches:
            lengths = batch["attention_mask"].sum(1).tolist()
            text = read_batch(model, **{name: value.to(device) for name, value in batch.items()})
            counted = text.targets != IGNORED
            number = torch.arange(begin, begin + len(lengths), device=device)[:, None]
            rows.append(number.expand_as(counted)[counted].cpu())
            if thoughts is None:
                without.append(text_log_prob(model, text)[counted].float().cpu())
            else:
                grid = model.grid(text.tokens.shape[1], rationales=1, ahead_tokens=1)
                if thoughts == OWN:
                    here = think(model, text, grid, temperature=temperature, seed=seed, row_offset=positions)
                else:
                    given = _given(thoughts, begin, lengths, text.tokens.shape[1])
                    grid = model.grid(grid.positions, rationales=1, ahead_tokens=1, thought_tokens=given.shape[-1])
                    here = given.to(device)
                spoken = talk(model, text, grid, here, max_grid_tokens=max_grid_tokens)
                without.append(spoken.log_base[counted].float().cpu())
                after.append(spoken.log_talk[:, :, 0, 0][counted].float().cpu())
                read += [thought[:length, 0].cpu() for thought, length in zip(here, lengths, strict=True)]
            positions += text.tokens.numel()
            begin += len(lengths)
    if thoughts is not None and thoughts != OWN and len(thoughts) != begin:
        raise ValueError(f"thoughts are given for {len(thoughts)} rows, but there are {begin}")
    if not begin:
        raise ValueError("batches are none, but there must be text to score")
    return TextScores(torch.cat(rows), torch.cat(without), torch.cat(after) if after else None, read)


def _given(thoughts: Sequence[Tensor], begin: int, lengths: list[int], width: int) -> Tensor:
    """The given thoughts of the rows of a batch from row ``begin`` on, ``[B, N, 1, K]``; zeros in the padding."""
    here = thoughts[begin : begin + len(lengths)]
    if len(here) < len(lengths):
        raise ValueError(f"thoughts are given for {len(thoughts)} rows, but there are at least {begin + len(lengths)}")
    padded = torch.zeros(len(lengths), width, 1, here[0].shape[-1], dtype=torch.int64)
    for row, (thought, length) in enumerate(zip(here, lengths, strict=True)):
        if thought.ndim != 2 or thought.shape != (length, padded.shape[-1]):
            raise ValueError(
                f"thoughts of row {begin + row} have shape {list(thought.shape)}, but it must be [L, K] with "
                f"L = {length}, the tokens of the row, and K = {padded.shape[-1]} as in the first"
            )
        padded[row, :length, 0] = thought
    return padded
