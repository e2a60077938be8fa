"""What a model reads in the place of its own thoughts, so that a gain can be told from that of a longer pass.

A thought helps by what it says if nothing else of its length helps as much: tokens that say nothing, tokens by chance,
what was thought somewhere else, what the model thought before it was trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qstar.model import QuietStarModel, vocabulary_size

PAUSE, ELSEWHERE, RANDOM, UNTRAINED = (
    "pause tokens",
    "another position's thoughts",
    "random tokens",
    "untrained thoughts",
)
CONTROLS = (PAUSE, ELSEWHERE, RANDOM, UNTRAINED)
PAUSES = (" .", ".", " ...", "...")  # the first that is one token


def pause_token(model: QuietStarModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """A token that says nothing: a dot; where the vocabulary has none, the one that opens a thought."""
    for text in PAUSES:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id:
            return tokens[0]
    return model.qstar.start_token_id


def pauses(shapes: Sequence[tuple[int, int]], token: int) -> list[Tensor]:
    """For each request of ``shapes`` (L, K) thoughts of one token, ``[L, K]`` int64."""
    return [torch.full(shape, token) for shape in shapes]


def random_tokens(
    model: QuietStarModel, tokenizer: PreTrainedTokenizerBase, shapes: Sequence[tuple[int, int]], seed: int
) -> list[Tensor]:
    """For each request of ``shapes`` (L, K) words of the vocabulary by chance, ``[L, K]`` int64; no special tokens."""
    special = [*tokenizer.all_special_ids, model.qstar.start_token_id, model.qstar.end_token_id]
    words = np.setdiff1d(np.arange(min(len(tokenizer), vocabulary_size(model))), special)
    drawn = (np.random.default_rng([seed, number]).choice(words, shape) for number, shape in enumerate(shapes))
    return [torch.from_numpy(each) for each in drawn]


def elsewhere(thoughts: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Thoughts ``[L, K]`` of requests, each of them moved to another position of any request.

    Raises:
        ValueError: there is one position alone.
    """
    every = torch.cat(list(thoughts))
    if len(every) < 2:
        raise ValueError("thoughts are at one position, but there must be another to take one from: ask more questions")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(every)))
    moved = torch.empty_like(every)
    moved[order] = every[order.roll(1)]  # one round trip through all positions, so that none keeps its own
    return list(moved.split([len(each) for each in thoughts]))
