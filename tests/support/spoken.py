"""What a model generated with thoughts, and what the packed pass of training says of the same thoughts."""

from __future__ import annotations

import tiny
import torch
from torch import Tensor

from qstar.generation.output import ThinkingOutput
from qstar.grid import Text
from qstar.model import QuietStarModel
from qstar.talking import read_grid


def opinionated(family: str, **settings) -> QuietStarModel:
    """A tiny model whose thoughts weigh in, and which says no end on its own."""
    model = tiny.thinking_model(
        family, **(dict(thought_tokens=3, ahead_tokens=1, rationales=1, check=False) | settings)
    )
    generator = torch.Generator().manual_seed(5)
    weight = model.qstar_mixing_head.output.weight
    weight.data = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def padded(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Prompts and their mask, each row but the first with one more token of padding on its left."""
    tokens, mask = tiny.text(rows, length), torch.ones(rows, length, dtype=torch.int64)
    for row in range(rows):
        mask[row, :row] = 0
        tokens[row, :row] = 0
    return tokens, mask


def generate(model: QuietStarModel, tokens: Tensor, mask: Tensor | None = None, **options) -> ThinkingOutput:
    """Ten tokens with all that can be returned, and ``logits`` in the model's dtype, ``[B, L, V]``."""
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: seen.append(output.logits))
    defaults = dict(max_new_tokens=10, do_sample=False, thought_temperature=1.0, thought_seed=3)
    asked = dict(return_dict_in_generate=True, output_thoughts=True)
    try:
        output = model.generate(tokens, attention_mask=mask, think=True, **(defaults | asked | options))
    finally:
        hook.remove()
    output.logits = torch.cat(seen[-(output.sequences.shape[1] - tokens.shape[1]) :], dim=1)
    return output


@torch.no_grad()
def packed_log_probs(
    model: QuietStarModel, output: ThinkingOutput, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[B, L, V]`` after the thoughts before each generated token, and their weights ``[B, L]``."""
    thoughts, tokens = output.thoughts, output.sequences[:, :-1]
    length, said = tokens.shape[1], thoughts.shape[1]
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], dim=1)
    grid = model.grid(length, rationales=1, thought_tokens=thoughts.shape[2], ahead_tokens=1)
    everywhere = thoughts[:, :1].expand(-1, length, -1).clone()
    everywhere[:, -said:] = thoughts
    states = read_grid(model, Text.from_inputs(tokens, mask), grid, everywhere[:, :, None])
    base, _, after = grid.split(states)
    base, after = base[:, -said:].flatten(0, 1), after[:, -said:].flatten(0, 3)
    mixed, weight = model.mix(base, after, torch.arange(len(base), device=base.device))
    logits = model.language_head().logits(mixed)
    return logits.log_softmax(-1).unflatten(0, (-1, said)), weight.view(-1, said)
