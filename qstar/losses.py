"""What a model learns from its thoughts: the likelihood of the text with and without them, and a reward for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from qstar.attention import Packed
from qstar.grid import IGNORED, Text, ThoughtGrid
from qstar.thoughts import read_grid, think

BASELINES = ("mean", "leave_one_out", "base")


@dataclass
class QuietStarOutput(ModelOutput):
    """One pass of the objective.

    Attributes:
        loss: what to minimise, a scalar.
        likelihood_loss: its part ``(NLL_base + NLL_talk) / 2``.
        policy_loss: its REINFORCE part, before the policy weight.
        nll_base: mean negative log-likelihood of a text token without a thought, nats.
        nll_talk: the same after a thought, mean over the ``m`` tokens ahead.
        reward: mean of the advantages that count, nats.
        rewarded: share of the thoughts whose advantage counts and is not 0.
        mixing_weight: mean weight of the thoughts.
        thoughts: sampled tokens, ``[B, N, r, K]`` int64.
    """

    loss: Tensor | None = None
    likelihood_loss: Tensor | None = None
    policy_loss: Tensor | None = None
    nll_base: Tensor | None = None
    nll_talk: Tensor | None = None
    reward: Tensor | None = None
    rewarded: Tensor | None = None
    mixing_weight: Tensor | None = None
    thoughts: Tensor | None = None


@dataclass
class Talk:
    """Log-probabilities of the text, fp32 nats; 0 where there is nothing to predict.

    Attributes:
        loss: ``(NLL_base + NLL_talk) / 2``; of all this it alone and ``policy`` carry gradients.
        log_base: without thoughts, ``[B, N]``.
        log_talk: of ``x_{i+k+1}`` after the thought at ``i``, ``[B, N, r, m]``.
        weight: of the thought in the mix, ``[B, N, r, m]``.
        targets: what ``log_talk`` scores, ``[B, N, m]`` int64, ``IGNORED`` where nothing.
        policy: states that predict the sampled tokens, ``[B, N, r, K, E]``.
    """

    loss: Tensor
    log_base: Tensor
    log_talk: Tensor
    weight: Tensor
    targets: Tensor
    policy: Tensor


def talk(model: PreTrainedModel, text: Text, grid: ThoughtGrid, thoughts: Tensor, backend: str = "auto") -> Talk:
    """Score the text with and without the given thoughts ``[B, N, r, K]``, in one packed pass."""
    base, policy, after = grid.split(read_grid(model, text, grid, thoughts, backend))
    batch, positions = text.tokens.shape
    targets = text.talk_targets(grid)

    row = torch.arange(batch, device=base.device)[:, None, None] * positions
    base_index = repeat(row + grid.ahead_positions(base.device), "b n m -> b n r m", r=grid.rationales)
    base = rearrange(base, "b n e -> (b n) e")
    mixed, weight = model.qstar_mixing_head(
        base, after.flatten(0, 3), base_index.flatten(), sigmoid=model.qstar.sigmoid
    )
    talk_targets = repeat(targets, "b n m -> b n r m", r=grid.rationales)
    total, log_prob = model.language_head().log_prob_sum(
        torch.cat([base.to(mixed.dtype), mixed]),
        torch.cat([text.targets.flatten(), talk_targets.flatten()]),
        torch.cat(
            [_shares(text.targets, (0, 1)).flatten(), _shares(talk_targets, (0, 1, 2)).flatten() / grid.ahead_tokens]
        ),
    )
    log_base, log_talk = log_prob.split([len(base), len(mixed)])
    return Talk(
        loss=-total / 2,
        log_base=log_base.view(batch, positions),
        log_talk=log_talk.view_as(base_index),
        weight=weight.detach().view_as(base_index),
        targets=targets,
        policy=policy,
    )


def read_batch(model: PreTrainedModel, *args: Tensor | None, **batch: Tensor) -> Text:
    """A batch as :meth:`qstar.grid.Text.from_inputs` takes it; thought tokens in the text are read, never learned."""
    text = Text.from_inputs(*args, **batch)
    said = torch.isin(text.targets, model.language_head().forbidden)
    return replace(text, targets=text.targets.masked_fill(said, IGNORED))


def text_loss(model: PreTrainedModel, *args, **batch: Tensor) -> Tensor:
    """Mean negative log-likelihood of a text without thoughts, nats; the batch as ``Text.from_inputs`` takes it."""
    text = read_batch(model, *args, **batch)
    hidden = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start))
    log_prob = model.language_head().log_prob(hidden.flatten(0, 1), text.targets.flatten())
    return -_mean(log_prob, text.targets.flatten() != IGNORED)


def advantages(scores: Tensor, base_scores: Tensor, baseline: str) -> Tensor:
    """How much better each rationale did than its baseline.

    Args:
        scores: S, summed log-probabilities after each rationale, ``[B, N, r]``.
        base_scores: the same without a thought, ``[B, N]``.
        baseline: ``mean`` of the rationales, the others' (``leave_one_out``), or ``base``: without a thought.

    Returns:
        ``[B, N, r]``. Equal scores give exactly 0. With one rationale every baseline is ``base``.
    """
    rationales = scores.shape[-1]
    if baseline == "base" or rationales == 1:
        return scores - base_scores[..., None]
    difference = scores - scores[..., :1]
    centred = difference - difference.mean(-1, keepdim=True)
    return centred if baseline == "mean" else centred * (rationales / (rationales - 1))


@dataclass
class Objective:
    """Quiet-STaR's training objective; calling it thinks, talks and returns the losses (paper, sections 4.2 to 4.4).

    Attributes:
        policy_weight: beta, the weight of the REINFORCE loss.
        temperature: thoughts are sampled at; 0 is greedy.
        reinforce_temperature: the log-probabilities of sampled tokens are taken at.
        baseline: what a thought is compared with, one of ``mean``, ``leave_one_out``, ``base``.
        signed: learn from thoughts that did worse as well; by default only from those that did better.
        seed: of the thoughts.
        row_offset: rows (batch, position, rationale) that other processes or batches have before these.
        backend: of the attention over the thought grid.
        cuda_graph: replay thinking from a CUDA graph, see :func:`qstar.thoughts.think`.
    """

    policy_weight: float = 1.0
    temperature: float = 1.0
    reinforce_temperature: float = 3.0
    baseline: str = "mean"
    signed: bool = False
    seed: int = 0
    row_offset: int = 0
    backend: str = "auto"
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}, but it must be one of {', '.join(BASELINES)}")
        if self.policy_weight < 0:
            raise ValueError(f"policy_weight is {self.policy_weight}, but it must be at least 0")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but it must be at least 0")
        if self.reinforce_temperature <= 0:
            raise ValueError(f"reinforce_temperature is {self.reinforce_temperature}, but it must be above 0")

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        thoughts: Tensor | None = None,
    ) -> QuietStarOutput:
        """Think about a batch, as ``Text.from_inputs`` takes it, or take ``thoughts`` ``[B, N, r, K]`` as given."""
        text = read_batch(model, input_ids, attention_mask, labels, position_ids)
        grid = model.grid(input_ids.shape[1])
        if thoughts is None:
            sampling = dict(temperature=self.temperature, seed=self.seed, row_offset=self.row_offset)
            thoughts = think(model, text, grid, **sampling, cuda_graph=self.cuda_graph)
        spoken = talk(model, text, grid, thoughts, self.backend)
        nll_base = -_mean(spoken.log_base, text.targets != IGNORED)
        counts = spoken.targets != IGNORED
        per_step = [-_mean(spoken.log_talk[..., k].mean(-1), counts[..., k]) for k in range(grid.ahead_tokens)]
        nll_talk = torch.stack(per_step).mean()
        whole = counts.all(-1)
        advantage = self.advantage(spoken, grid) * whole[..., None]
        policy_loss = self.policy_loss(model, spoken.policy, thoughts, advantage, whole)
        return QuietStarOutput(
            loss=spoken.loss + self.policy_weight * policy_loss,
            likelihood_loss=spoken.loss,
            policy_loss=policy_loss,
            nll_base=nll_base,
            nll_talk=nll_talk,
            reward=_mean(advantage.mean(-1), whole),
            rewarded=_mean((advantage != 0).float().mean(-1), whole),
            mixing_weight=_mean(spoken.weight.mean(2), counts),
            thoughts=thoughts,
        )

    def advantage(self, spoken: Talk, grid: ThoughtGrid) -> Tensor:
        """The detached advantages ``[B, N, r]`` of the thoughts; clamped at 0 unless signed."""
        log_base = spoken.log_base[:, grid.ahead_positions(spoken.log_base.device)]
        # A thought of weight 0 changed nothing; rounding in a product over other rows must not reward it.
        log_talk = torch.where(spoken.weight == 0, log_base[:, :, None], spoken.log_talk)
        advantage = advantages(log_talk.sum(-1), log_base.sum(-1), self.baseline)
        return advantage if self.signed else advantage.clamp(min=0)

    def policy_loss(
        self, model: PreTrainedModel, policy: Tensor, thoughts: Tensor, advantage: Tensor, whole: Tensor
    ) -> Tensor:
        """REINFORCE over the sampled tokens; only thoughts whose advantage is not 0 meet the head.

        Args:
            model: the model.
            policy: states that predict the sampled tokens, ``[B, N, r, K, E]``.
            thoughts: the sampled tokens, ``[B, N, r, K]``.
            advantage: ``[B, N, r]``, 0 where a thought does not count.
            whole: positions all of whose ``m`` targets count, ``[B, N]``.
        """
        counted = advantage.nonzero(as_tuple=True)
        length = thoughts.shape[-1]
        share = advantage[counted] / (whole.sum() * thoughts.shape[2] * length).clamp(min=1)
        head = model.language_head()
        total, _ = head.log_prob_sum(
            policy[counted].flatten(0, 1).to(head.dtype),
            thoughts[counted].flatten(),
            share.repeat_interleave(length),
            temperature=self.reinforce_temperature,
        )
        return -total


def _shares(targets: Tensor, over: tuple[int, ...]) -> Tensor:
    """The weight of each target in the mean over the axes ``over``, ignored ones left out."""
    counts = (targets != IGNORED).double()
    return counts / counts.sum(over, keepdim=True).clamp(min=1)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of ``values`` over ``where``; 0 where that is empty."""
    return (values * where).sum() / where.sum().clamp(min=1)
