"""The objectives in plain loops: what ``talking.py``, ``learning.py`` and ``distilling.py`` compute.

To be read beside the paper: a plain causal pass of the model for every thought, no thought grid, no packed pass, no
cache, no op of ours. It is the specification that the tests hold the product against, and far too slow for anything
else. Names are the paper's: ``u`` base state, ``g`` state after the thought, ``w`` mixing weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar.heads import ThoughtAlone
from qstar.model import QuietStarModel


def hidden_states(model: QuietStarModel, tokens: Tensor) -> Tensor:
    """Hidden states ``[S, E]`` of one sequence ``[S]`` in the model's plain causal pass."""
    return model.base_model(inputs_embeds=model.embed(tokens[None]), use_cache=False).last_hidden_state[0]


def logits(model: QuietStarModel, hidden: Tensor) -> Tensor:
    """Logits ``[..., V]`` of hidden states ``[..., E]``; those of the thought tokens are -inf."""
    config = model.config.get_text_config(decoder=True)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    values = model.get_output_embeddings()(hidden) * scale
    values = values if cap is None else cap * torch.tanh(values / cap)
    forbidden = torch.zeros_like(values, dtype=torch.bool)
    forbidden[..., [model.qstar.start_token_id, model.qstar.end_token_id]] = True
    return values.masked_fill(forbidden, -torch.inf)


def mix(model: QuietStarModel, u: Tensor, g: Tensor) -> Tensor:
    """``(1 - w) u + w g``, the weight by the mixing head's MLP on both states ``[E]`` (paper, section 4.4).

    Without a mixing head w is 1.
    """
    head = model.qstar_mixing_head
    if isinstance(head, ThoughtAlone):
        return g
    w = head.output(torch.relu(head.hidden(torch.relu(head.input(torch.cat([u, g]))))))
    w = torch.sigmoid(w) if model.qstar.sigmoid else w
    return (1 - w) * u + w * g


def distillation(
    model: QuietStarModel,
    tokens: Tensor,
    thoughts: Tensor,
    *,
    likelihood_weight: float,
    positions: list[int] | None = None,
) -> dict[str, Tensor]:
    """What a stage that distils minimises, of one text with given thoughts.

    The divergence is the mean over the positions with thoughts of KL(q || p), q being what is predicted after each
    thought, averaged in probability over the rationales, and p what is predicted without; q carries no gradient.

    Args:
        model: the model; its attention may be any that transformers has.
        tokens: the text x, ``[N]`` int64.
        thoughts: sampled tokens, ``[N, r, K]`` int64; those at ``positions`` ``[n, r, K]``.
        likelihood_weight: of the likelihood of the text without thoughts.
        positions: of the text that are thought at; by default all.

    Returns:
        Scalars ``loss``, ``divergence`` and ``nll_base``, nats, with gradients.
    """
    start, end = tokens.new_tensor([model.qstar.start_token_id]), tokens.new_tensor([model.qstar.end_token_id])
    base = hidden_states(model, tokens)
    log_base = [logits(model, base[i]).log_softmax(-1)[tokens[i + 1]] for i in range(len(tokens) - 1)]
    divergences = []
    for place, i in enumerate(range(len(tokens)) if positions is None else positions):
        if i == len(tokens) - 1:  # nothing is predicted there
            continue
        after = []
        for thought in thoughts[place]:
            state = hidden_states(model, torch.cat([tokens[: i + 1], start, thought, end]))[-1]
            after.append(logits(model, mix(model, base[i], state)).softmax(-1))
        q = torch.stack(after).mean(0).detach()
        log_p = logits(model, base[i]).log_softmax(-1)
        said = q > 0
        divergences.append((q[said] * (q[said].log() - log_p[said])).sum())
    divergence, nll_base = torch.stack(divergences).mean(), -torch.stack(log_base).mean()
    return {"loss": likelihood_weight * nll_base + divergence, "divergence": divergence, "nll_base": nll_base}


def objective(
    model: QuietStarModel,
    tokens: Tensor,
    thoughts: Tensor,
    *,
    policy_weight: float,
    reinforce_temperature: float,
    baseline: str = "leave_one_out",
    signed: bool = True,
    likelihood_weight: float = 1.0,
    entropy_weight: float = 0.0,
    positions: list[int] | None = None,
) -> dict[str, Tensor]:
    """The objective of one text with given thoughts.

    Args:
        model: the model; its attention may be any that transformers has.
        tokens: the text x, ``[N]`` int64.
        thoughts: sampled tokens, ``[N, r, K]`` int64; those at ``positions`` ``[n, r, K]``.
        policy_weight: beta.
        reinforce_temperature: the log-probabilities of sampled tokens are taken at.
        baseline: ``mean``, ``leave_one_out`` or ``base``, as in :func:`qstar.learning.advantages`.
        signed: learn from thoughts that did worse as well.
        likelihood_weight: of the likelihood of the text.
        entropy_weight: of the bonus for the policy's entropy.
        positions: of the text that are thought at; by default all.

    Returns:
        Scalars ``loss``, ``nll_base``, ``nll_talk`` and ``policy_loss``, and ``policy_entropy`` where it has a weight,
        with gradients.
    """
    count, ahead = len(tokens), model.qstar.ahead_tokens
    rationales, length = thoughts.shape[1:]
    start, end = tokens.new_tensor([model.qstar.start_token_id]), tokens.new_tensor([model.qstar.end_token_id])

    # Without thoughts: the base states u, and log p_base of every next token.
    base = hidden_states(model, tokens)
    log_base = [logits(model, base[i]).log_softmax(-1)[tokens[i + 1]] for i in range(count - 1)]

    # With each thought: log p_talk of the tokens ahead, the mean log-probability of the thought itself, and the mean
    # entropy of what its tokens are drawn from.
    log_talk: dict[tuple[int, int, int], Tensor] = {}
    log_policy: dict[tuple[int, int], Tensor] = {}
    entropy: dict[tuple[int, int], Tensor] = {}
    where = range(count) if positions is None else positions
    for place, i in enumerate(where):
        for p in range(rationales):
            thought = thoughts[place, p]
            alone = torch.cat([tokens[: i + 1], start, thought, end, tokens[i + 1 : i + ahead]])
            states = hidden_states(model, alone)[i + 1 :]
            sampled = (logits(model, states[:length]) / reinforce_temperature).log_softmax(-1)
            log_policy[i, p] = sampled.gather(-1, thought[:, None]).mean()
            drawn_from = logits(model, states[:length]).log_softmax(-1)
            log_p = drawn_from.masked_fill(drawn_from == -torch.inf, 0)  # p log p is 0 where p is
            entropy[i, p] = -(drawn_from.exp() * log_p).sum(-1).mean()
            for k in range(min(ahead, count - 1 - i)):
                mixed = mix(model, base[i + k], states[length + 1 + k])
                log_talk[i, p, k] = logits(model, mixed).log_softmax(-1)[tokens[i + k + 1]]

    nll_base = -torch.stack(log_base).mean()
    per_step = [torch.stack([x for (_, _, step), x in log_talk.items() if step == k]) for k in range(ahead)]
    nll_talk = -torch.stack([values.mean() for values in per_step]).mean()

    # REINFORCE, over the positions all of whose tokens ahead exist.
    terms, whole = [], [i for i in where if i < count - ahead]
    for i in whole:
        without = torch.stack(log_base[i : i + ahead]).sum()
        scores = torch.stack([torch.stack([log_talk[i, p, k] for k in range(ahead)]).sum() for p in range(rationales)])
        for p in range(rationales):
            others = torch.cat([scores[:p], scores[p + 1 :]])
            if baseline == "base" or rationales == 1:
                average = without
            else:
                average = scores.mean() if baseline == "mean" else others.mean()
            advantage = (scores[p] - average).detach()
            terms.append((advantage if signed else advantage.clamp(min=0)) * log_policy[i, p])
    policy_loss = -torch.stack(terms).mean()
    policy_entropy = torch.stack([entropy[i, p] for i in whole for p in range(rationales)]).mean()
    loss = likelihood_weight * (nll_base + nll_talk) / 2 + policy_weight * policy_loss
    return {
        "loss": loss - entropy_weight * policy_entropy if entropy_weight else loss,
        "nll_base": nll_base,
        "nll_talk": nll_talk,
        "policy_loss": policy_loss,
        **({"policy_entropy": policy_entropy} if entropy_weight else {}),
    }
