"""Thoughts and answers by plain passes of the model, the mixing by hand: no grid, no cache, no op of ours."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar import QuietStarModel, reference


def greedy_thought(model: QuietStarModel, prompt: Tensor) -> Tensor:
    """The thought ``[K]`` about a prompt ``[N]``, every token by a plain pass over all before it."""
    tokens = torch.cat([prompt, prompt.new_tensor([model.qstar.start_token_id])])
    for _ in range(model.qstar.thought_tokens):
        said = reference.logits(model, reference.hidden_states(model, tokens)[-1]).argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, said])
    return tokens[len(prompt) + 1 :]


def answer_log_probs(model: QuietStarModel, prompt: Tensor, choices: Tensor, thought: Tensor | None) -> Tensor:
    """Log-probabilities of the permitted answers, ``[A]``, with a thought ``[K]`` or without one."""
    state = reference.hidden_states(model, prompt)[-1]
    if thought is not None:
        start, end = ([token] for token in (model.qstar.start_token_id, model.qstar.end_token_id))
        whole = torch.cat([prompt, prompt.new_tensor(start), thought, prompt.new_tensor(end)])
        state = reference.mix(model, state, reference.hidden_states(model, whole)[-1])
    return reference.logits(model, state)[choices].log_softmax(-1)
