"""The reference masked-attention path: the objective as the authors' code computes it.

One pass of the model for every token of a thought, each over all N columns, with gradient. Its keys are those of all
passes so far under a dense mask [N, N*passes]; the batch is copied for every rationale; every pass meets the head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from qstar.generation.naming import CACHE
from qstar.learning import PAPER, Objective, advantages

SAME = Objective(**PAPER, policy_weight=1.0)  # what ours is told to compute beside it


def visible(positions: int, passes: int, device: torch.device) -> Tensor:
    """The mask of the newest pass, ``[N, N*passes]``: earlier text, and the own column of every thought pass."""
    text = torch.ones(positions, positions, dtype=torch.bool, device=device).tril()
    own = torch.eye(positions, dtype=torch.bool, device=device)
    return torch.cat([text] + [own] * (passes - 1), dim=1)


def masked_objective(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    beta: float = SAME.policy_weight,
    tau: float = SAME.reinforce_temperature,
    seed: int = 0,
    thoughts: Tensor | None = None,
) -> Tensor:
    """The loss for texts ``[B, N]``; thoughts are sampled from ``seed``, or given, ``[B, N, r, K]``."""
    settings = model.qstar
    rationales, length, ahead = settings.rationales, settings.thought_tokens, settings.ahead_tokens
    generator = torch.Generator(tokens.device).manual_seed(seed)
    batch, positions = tokens.shape
    copies = tokens.repeat_interleave(rationales, 0)
    forbidden = [settings.start_token_id, settings.end_token_id]
    cache = DynamicCache()

    def read(column: Tensor, offset: int) -> Tensor:
        passes = cache.get_seq_length() // positions + 1
        mask = visible(positions, passes, tokens.device)[None, None].expand(len(copies), 1, -1, -1)
        ids = torch.arange(positions, device=tokens.device) + offset
        return model.base_model(
            inputs_embeds=model.embed(column),
            position_ids=ids.expand_as(copies),
            attention_mask=mask,
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state

    def logits(hidden: Tensor) -> Tensor:
        scores = model.get_output_embeddings()(hidden)
        return scores.index_fill(-1, torch.tensor(forbidden, device=scores.device), -torch.inf)

    def score(hidden: Tensor, step: int) -> Tensor:
        """Log-probability of the token ``step + 1`` after each column, ``[B*r, N - 1 - step]``."""
        count = positions - 1 - step
        targets = copies[:, step + 1 :, None]
        return logits(hidden[:, :count]).log_softmax(-1).gather(-1, targets)[..., 0]

    base = read(copies, 0)
    log_base = score(base, 0)
    log_policy = []
    column = torch.full_like(copies, settings.start_token_id)
    for step in range(length):
        scores = logits(read(column, 1 + step))
        if thoughts is None:
            drawn = torch.multinomial(scores.detach().softmax(-1).flatten(0, 1), 1, generator=generator)
        else:
            drawn = thoughts[..., step].transpose(1, 2)
        column = drawn.reshape(copies.shape)
        log_policy.append((scores / tau).log_softmax(-1).gather(-1, column[..., None])[..., 0])
    read(column, 1 + length)

    column = torch.full_like(copies, settings.end_token_id)
    talk = []
    for step in range(ahead):
        after = read(column, 2 + length + step)
        count = positions - step
        u, g = base[:, step:], after[:, :count]
        head = model.qstar_mixing_head
        w = head.output(torch.relu(head.hidden(torch.relu(head.input(torch.cat([u, g], dim=-1))))))
        talk.append(score(u + w * (g - u), step))
        column = torch.cat([copies[:, step + 1 :], copies[:, -1:].expand(-1, step + 1)], dim=1)

    whole = positions - ahead
    total = sum(each[:, :whole] for each in talk)
    total_base = sum(log_base[:, step : step + whole] for step in range(ahead))
    per_position = total.detach().view(batch, rationales, whole).transpose(1, 2)
    base_scores = total_base.detach().view(batch, rationales, whole)[:, 0]
    advantage = advantages(per_position, base_scores, "mean").clamp(min=0).transpose(1, 2).reshape(-1, whole)
    policy = torch.stack(log_policy)[:, :, :whole].mean(0)
    nll = (-log_base.mean() - torch.stack([each.mean() for each in talk]).mean()) / 2
    return nll - beta * (advantage * policy).mean()
