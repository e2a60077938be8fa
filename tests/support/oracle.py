"""The objective from a model's own plain passes: what every class that thinks is held against.

It takes ``input_ids`` and nothing else, one pass for every position and its thoughts, with the model's own attention
and its own output head; no thought grid, no embeddings, no cache, no op of ours. Mixed states meet the head where the
head's own input stood. Thought tokens are those of the vocabulary's rows.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qstar.config import QuietStarConfig
from qstar.heads import MixingHead


class Doubled(TorchFunctionMode):
    """Everything that asks for float32 gets float64: norms and routers that raise to float32 stay exact."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def raised(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        kwargs = {name: raised(value) for name, value in (kwargs or {}).items()}
        return func(*map(raised, args), **kwargs)


@dataclass
class Scores:
    """What the objective says of documents, in the order in which they and their positions come."""

    loss: Tensor
    log_base: Tensor
    log_talk: Tensor
    most: Tensor  # the largest log-probability wherever a thought's token is sampled
    said: Tensor  # that of the token


class Oracle:
    """A plain model and a mixing head."""

    def __init__(self, plain: PreTrainedModel, mixing: MixingHead, settings: QuietStarConfig):
        self.plain, self.mixing, self.settings = plain, copy.deepcopy(mixing), settings
        self.decoder: nn.Module = plain  # the outermost module that returns last hidden states: the last to return
        with contextlib.ExitStack() as hooks:
            for module in plain.modules():
                hooks.enter_context(module.register_forward_hook(self._returned))
            plain(input_ids=torch.full((1, 1), 5), use_cache=False)

    def _returned(self, module: nn.Module, _: Any, made: Any) -> None:
        if module is not self.plain and hasattr(made, "last_hidden_state"):
            self.decoder = module

    def states(self, tokens: Tensor) -> Tensor:
        """The decoder's last hidden states ``[B, S, E]`` for tokens ``[B, S]``."""
        seen: list[Tensor] = []
        with self.decoder.register_forward_hook(lambda _, __, made: seen.append(made.last_hidden_state)):
            self.plain(input_ids=tokens, use_cache=False)
        return seen[0]

    def log_probs(self, states: Tensor) -> Tensor:
        """Log-probabilities ``[R, V]`` at last hidden states ``[R, E]``, none for the thought tokens."""

        def exchanged(_: Any, __: Any, made: Any) -> Any:
            made.last_hidden_state = states[None]
            return made

        with self.decoder.register_forward_hook(exchanged):
            logits = self.plain(input_ids=torch.full((1, len(states)), 5), use_cache=False).logits[0]
        forbidden = torch.zeros_like(logits, dtype=torch.bool)
        forbidden[:, [self.settings.start_token_id, self.settings.end_token_id]] = True
        return logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)

    def mix(self, u: Tensor, g: Tensor) -> Tensor:
        head = self.mixing
        w = head.output(torch.relu(head.hidden(torch.relu(head.input(torch.cat([u, g], dim=-1))))))
        return u + w * (g - u)

    def __call__(self, documents: list[tuple[Tensor, Tensor]], reinforce_temperature: float) -> Scores:
        """Score documents: tokens ``[N]`` and thoughts ``[N, r, K]`` of each. The baseline is ``base``, signed."""
        ahead, length = self.settings.ahead_tokens, documents[0][1].shape[-1]
        start, end = self.settings.start_token_id, self.settings.end_token_id
        bases, mixed, policies, targets, spots = [], [], [], [], []
        for tokens, thoughts in documents:
            base = self.states(tokens[None])[0]
            bases.append(base)
            for i in range(len(tokens)):
                count = len(thoughts[i])
                edge = torch.full((count, 1), start)
                before, after = (part.expand(count, -1) for part in (tokens[: i + 1], tokens[i + 1 : i + ahead]))
                rows = torch.cat([before, edge, thoughts[i], edge.new_full((count, 1), end), after], dim=1)
                states = self.states(rows)[:, i + 1 :]
                policies.append(states[:, :length])
                for k in range(min(ahead, len(tokens) - 1 - i)):
                    mixed.append(self.mix(base[i + k].expand(count, -1), states[:, length + 1 + k]))
                    targets.append(tokens[i + k + 1].expand(count))
                    spots.append((len(bases) - 1, i, k))
        log_base = [
            self.log_probs(base[:-1]).gather(-1, tokens[1:, None])[:, 0]
            for base, (tokens, _) in zip(bases, documents, strict=True)
        ]
        log_talk = self.log_probs(torch.cat(mixed)).gather(-1, torch.cat(targets)[:, None])[:, 0]
        log_talk = log_talk.unflatten(0, (len(spots), -1))
        at = {spot: log_talk[index] for index, spot in enumerate(spots)}

        policy = torch.cat(policies)
        sampled = torch.cat([thoughts for _, thoughts in documents]).flatten(0, 1)
        logs = self.log_probs(policy.flatten(0, 1)).unflatten(0, policy.shape[:2])
        said = (logs / reinforce_temperature).log_softmax(-1).gather(-1, sampled[..., None])[..., 0].mean(-1)
        said = said.unflatten(0, (-1, log_talk.shape[1]))
        terms, first = [], 0
        for index, (tokens, _) in enumerate(documents):
            for i in range(len(tokens) - ahead):
                scores = torch.stack([at[index, i, k] for k in range(ahead)]).sum(0)
                terms.append((scores - log_base[index][i : i + ahead].sum()).detach() * said[first + i])
            first += len(tokens)
        nll_base = -torch.cat(log_base).mean()
        steps = [torch.stack([at[spot] for spot in spots if spot[2] == k]).mean() for k in range(ahead)]
        loss = (nll_base - torch.stack(steps).mean()) / 2 - torch.stack(terms).mean()
        logs = logs.detach().unflatten(0, (-1, log_talk.shape[1]))
        chosen = logs.gather(-1, sampled.unflatten(0, logs.shape[:2])[..., None])[..., 0]
        return Scores(loss, torch.cat(log_base).detach(), log_talk.detach(), logs.amax(-1), chosen)


def made_wild(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` with weights under which nothing hides: no gate at zero, no norm at one, every layer counts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model
