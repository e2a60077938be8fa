"""Questions with permitted answers: the paper's zero-shot evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar.grid import Text
from qstar.model import QuietStarModel, embedding_rows
from qstar.talking import speak
from qstar.thinking import evaluating, read_text, think


@torch.no_grad()
def choice_log_probs(
    model: QuietStarModel, prompts: Tensor, choices: Tensor, *, thinking: bool, thoughts: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the permitted answers, normalised over them.

    Args:
        model: from :func:`qstar.wrap` or :func:`qstar.load`.
        prompts: ``[B, N]`` int64, all of one length.
        choices: permitted next tokens, ``[A]`` int64.
        thinking: whether to think, greedily, before the answer.
        thoughts: thoughts to read instead of the model's own, ``[B, K]`` int64.

    Returns:
        ``[B, A]``, nats, on the device of ``prompts``.

    Raises:
        ValueError: thoughts without thinking, or of another shape.
    """
    if thoughts is not None and not thinking:
        raise ValueError("thoughts are given, but thinking is False: they would be ignored")
    device = embedding_rows(model).device
    text, choices = Text.from_inputs(prompts.to(device)), choices.to(device)
    grid = model.grid(prompts.shape[1], rationales=1)
    shape = (len(prompts), grid.thought_tokens)
    if thoughts is not None and thoughts.shape != shape:
        raise ValueError(f"thoughts have shape {list(thoughts.shape)}, but it must be [B, K] = {list(shape)}")
    with evaluating(model):
        reading = read_text(model, text, grid)
        if not thinking:
            states = reading.hidden[:, -1]
        elif thoughts is None:
            own = think(model, text, grid, temperature=0.0, last=1, reading=reading)
            states = speak(model, reading, own, cached=grid.thought_tokens)[:, 0, 0]
        else:
            states = speak(model, reading, thoughts.to(device)[:, None, None])[:, 0, 0]
    scores = model.language_head().log_prob(states.repeat_interleave(len(choices), 0), choices.repeat(len(prompts)))
    return scores.view(len(prompts), len(choices)).log_softmax(-1).to(prompts.device)
