"""Learn, the third of the paper's three steps: the likelihood of the text, and a reward for every thought.

:class:`Objective` thinks, talks and learns: what training minimises. ``reference.py`` says the same in plain loops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers.utils import ModelOutput

from qstar.grid import IGNORED, Counts, Text, ThoughtGrid
from qstar.heads import MixingHead
from qstar.model import QuietStarModel
from qstar.talking import Talk, read_batch, talk
from qstar.thinking import choose_positions, think

UNSET = cast(Tensor, None)  # ModelOutput wants None as the default of its fields
BASELINES = ("mean", "leave_one_out", "base")
PAPER: dict[str, Any] = dict(baseline="mean", signed=False, reinforce_temperature=3.0)  # its rule for the reward


@dataclass
class QuietStarOutput(ModelOutput):
    """One pass of the objective.

    Attributes:
        loss: what to minimise, a scalar.
        likelihood_loss: its part ``(NLL_base + NLL_talk) / 2``.
        policy_loss: its REINFORCE part, before the policy weight.
        nll_base: mean negative log-likelihood of a text token without a thought, nats.
        nll_talk: the same after a thought, mean over the ``m`` tokens ahead.
        reward: by how much thoughts did better than their baseline, mean of ``max(A, 0)``, nats.
        rewarded: share of the thoughts that did better.
        mixing_weight: mean weight of the thoughts.
        policy_entropy: mean entropy of the distribution that a sampled token is drawn from, at temperature 1, nats;
            None where it has no weight in the loss.
        divergence: of the prediction without a thought from that with thoughts, nats, where a stage distils, see
            :class:`qstar.distilling.Distillation`; ``likelihood_loss``, ``policy_loss``, ``reward`` and ``rewarded``
            are None there.
        thoughts: sampled tokens, ``[B, n, r, K]`` int64.
        positions: the text positions of the thoughts, ``[B, n]`` int64, ascending; None where they are at all N.
    """

    loss: Tensor = UNSET
    likelihood_loss: Tensor = UNSET
    policy_loss: Tensor = UNSET
    nll_base: Tensor = UNSET
    nll_talk: Tensor = UNSET
    reward: Tensor = UNSET
    rewarded: Tensor = UNSET
    mixing_weight: Tensor = UNSET
    policy_entropy: Tensor | None = None
    divergence: Tensor | None = None
    thoughts: Tensor = UNSET
    positions: Tensor | None = None

    def at_thoughts(self, values: Tensor) -> Tensor:
        """Of values ``[B, N]`` those at the positions that were thought at, ``[B, n]``."""
        return values if self.positions is None else values.gather(1, self.positions)


def never_counts(model: QuietStarModel) -> bool:
    """Whether no thought changes a prediction: the mixing head is as it starts, and its weight 0 for all of them."""
    head = model.qstar_mixing_head
    return isinstance(head, MixingHead) and not model.qstar.sigmoid and not bool(head.output.weight.any())


def advantages(scores: Tensor, base_scores: Tensor, baseline: str) -> Tensor:
    """How much better each rationale did than its baseline.

    Args:
        scores: S, summed log-probabilities after each rationale, ``[B, n, r]``.
        base_scores: the same without a thought, ``[B, n]``.
        baseline: ``mean`` of the rationales, the others' (``leave_one_out``), or ``base``: without a thought.

    Returns:
        ``[B, n, r]``. Equal scores give exactly 0. With one rationale every baseline is ``base``.
    """
    rationales = scores.shape[-1]
    if baseline == "base" or rationales == 1:
        return scores - base_scores[..., None]
    difference = scores - scores[..., :1]
    centred = difference - difference.mean(-1, keepdim=True)
    return centred if baseline == "mean" else centred * (rationales / (rationales - 1))


@dataclass(kw_only=True)
class Thinker:
    """How an objective thinks about a batch.

    Attributes:
        temperature: thoughts are sampled at; 0 is greedy.
        seed: of the thoughts.
        row_offset: rows (batch, position, rationale) that other processes or batches have before these.
        counts: what the means are taken over, where a batch is a part of a larger one whose parts add up: over this
            batch by default.
        max_grid_tokens: tokens of a grid that the model reads at once, see :func:`qstar.talking.read_grid`: the same
            losses and gradients in less memory. None: all.
        positions_per_row: n, think at so many random positions of each row, see :func:`choose_positions`: in proportion
            less to compute. None, or at least N: at all.
    """

    temperature: float = 1.0
    seed: int = 0
    row_offset: int = 0
    counts: Counts | None = None
    max_grid_tokens: int | None = None
    positions_per_row: int | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but it must be at least 0")
        for name in ("max_grid_tokens", "positions_per_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but it must be at least 1, or None")

    def grid(self, model: QuietStarModel, text: Text) -> ThoughtGrid:
        """The grid over a text, with the positions of it that are thought at."""
        grid = model.grid(text.tokens.shape[1])
        if self.positions_per_row is None:
            return grid
        return choose_positions(text, grid, self.positions_per_row, self.seed, self.row_offset)

    def thoughts_about(
        self, model: QuietStarModel, text: Text, thoughts: Tensor | None, positions: Tensor | None
    ) -> tuple[ThoughtGrid, Tensor]:
        """The grid over a text and the thoughts in it: new ones, or those that are given, as the objectives take them.

        Raises:
            ValueError: ``positions`` are given without thoughts, or there are thoughts at more or fewer.
        """
        if thoughts is None:
            if positions is not None:
                raise ValueError("positions are given, but not the thoughts at them")
            grid = self.grid(model, text)
            found = think(model, text, grid, temperature=self.temperature, seed=self.seed, row_offset=self.row_offset)
            return grid, found
        grid = replace(model.grid(text.tokens.shape[1]), chosen=positions)
        if thoughts.shape[1] != grid.thought_positions:
            known = f"{'the text' if positions is None else 'positions'} has {grid.thought_positions}"
            raise ValueError(f"thoughts are at {thoughts.shape[1]} positions of each row, but {known}")
        return grid, thoughts


@dataclass
class Objective(Thinker):
    """Quiet-STaR's training objective; calling it thinks, talks and returns the losses (paper, sections 4.2 to 4.4).

    By default thoughts are rewarded by an unbiased policy gradient; ``Objective(**PAPER)`` has the paper's rule.

    ``loss = likelihood_weight * likelihood_loss + policy_weight * policy_loss - entropy_weight * policy_entropy``

    With ``positions_per_row`` the likelihood is over all text without thoughts, and over the text ahead of the chosen
    positions with them.

    Attributes:
        policy_weight: beta, the weight of the REINFORCE loss.
        likelihood_weight: of the likelihood of the text, without thoughts and with; 0 leaves the reward alone.
        entropy_weight: of a bonus for thoughts that are not sure of their tokens: the policy's mean entropy. The
            paper has none.
        reinforce_temperature: the log-probabilities of sampled tokens are taken at.
        baseline: what a thought is compared with, one of ``mean``, ``leave_one_out``, ``base``.
        signed: learn from thoughts that did worse as well, not only from those that did better.
    """

    policy_weight: float = 10.0
    likelihood_weight: float = 1.0
    entropy_weight: float = 0.0
    reinforce_temperature: float = 1.0
    baseline: str = "leave_one_out"
    signed: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline is {self.baseline!r}, but it must be one of {', '.join(BASELINES)}")
        for name in ("policy_weight", "likelihood_weight", "entropy_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but it must be at least 0")
        if self.policy_weight == self.likelihood_weight == 0:
            raise ValueError("likelihood_weight and policy_weight are both 0, but something must be learned from")
        if self.reinforce_temperature <= 0:
            raise ValueError(f"reinforce_temperature is {self.reinforce_temperature}, but it must be above 0")

    def __call__(
        self,
        model: QuietStarModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        thoughts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> QuietStarOutput:
        """Think about a batch, as ``Text.from_inputs`` takes it, or take thoughts as given.

        Those are ``thoughts`` ``[B, n, r, K]``, at the text positions ``positions`` ``[B, n]`` int64, ascending in each
        row; at all of them by default.

        Raises:
            ValueError: ``positions`` are given without thoughts, or there are thoughts at more or fewer.
        """
        text = read_batch(model, input_ids, attention_mask, labels, position_ids)
        grid, thoughts = self.thoughts_about(model, text, thoughts, positions)
        counts = text.counts(grid) if self.counts is None else self.counts
        spoken = talk(model, text, grid, thoughts, counts, self.max_grid_tokens)
        counted = spoken.targets != IGNORED
        whole = counted.all(-1)
        entropy = None
        with record_function("qstar::learn"):
            advantage = self.advantage(spoken, grid) * whole[..., None]
            if model.qstar.pauses:  # nobody has chosen them
                advantage = torch.zeros_like(advantage)
            policy_loss = self.policy_loss(model, spoken.policy, thoughts, advantage, whole)
            loss = self.likelihood_weight * spoken.loss + self.policy_weight * policy_loss
            if self.entropy_weight:
                entropy = self.policy_entropy(model, spoken.policy, thoughts, whole)
                loss = loss - self.entropy_weight * entropy
        return QuietStarOutput(
            loss=loss,
            likelihood_loss=spoken.loss,
            policy_loss=policy_loss,
            nll_base=-mean(spoken.log_base, counts.text),
            nll_talk=-(spoken.log_talk.mean(2).sum((0, 1)) / counts.ahead.clamp(min=1)).mean(),
            reward=mean(advantage.clamp(min=0).mean(-1), counts.whole),
            rewarded=mean((advantage > 0).float().mean(-1), counts.whole),
            mixing_weight=mean(spoken.weight.mean(2) * counted, counts.ahead.sum()),
            policy_entropy=entropy,
            thoughts=thoughts,
            positions=grid.chosen,
        )

    def check(self, model: QuietStarModel) -> None:
        """Refuse what would have no effect on ``model``, or leave it as it is.

        Raises:
            ValueError: as it says.
        """
        if model.qstar.pauses and self.entropy_weight:
            raise ValueError(
                f"entropy_weight is {self.entropy_weight}, but the thoughts are pauses, which nobody draws"
            )
        if model.qstar.pauses and self.temperature != 1:
            raise ValueError(
                f"temperature of thoughts is {self.temperature}, but the thoughts are pauses, which nobody draws"
            )
        if model.qstar.pauses and not self.likelihood_weight:
            raise ValueError("likelihood_weight is 0, but the thoughts are pauses, which learn by the likelihood alone")
        if not self.likelihood_weight and never_counts(model):
            raise ValueError(
                "likelihood_weight is 0, but the mixing head starts at zero and learns by the likelihood alone, so "
                "that no thought would ever be rewarded: set mixing_head=False"
            )

    def advantage(self, spoken: Talk, grid: ThoughtGrid) -> Tensor:
        """The detached advantages ``[B, n, r]`` of the thoughts; clamped at 0 unless signed."""
        log_base = grid.ahead(spoken.log_base)
        # A thought of weight 0 changed nothing; rounding in a product over other rows must not reward it.
        log_talk = torch.where(spoken.weight == 0, log_base[:, :, None], spoken.log_talk)
        advantage = advantages(log_talk.sum(-1), log_base.sum(-1), self.baseline)
        return advantage if self.signed else advantage.clamp(min=0)

    def policy_loss(
        self, model: QuietStarModel, policy: Tensor, thoughts: Tensor, advantage: Tensor, whole: Tensor
    ) -> Tensor:
        """REINFORCE over the sampled tokens; only thoughts whose advantage is not 0 meet the head.

        Args:
            model: the model.
            policy: states that predict the sampled tokens, ``[B, n, r, K, E]``.
            thoughts: the sampled tokens, ``[B, n, r, K]``.
            advantage: ``[B, n, r]``, 0 where a thought does not count.
            whole: positions all of whose ``m`` targets count, ``[B, n]``.
        """
        counted = advantage.nonzero(as_tuple=True)
        length = thoughts.shape[-1]
        positions = whole.sum() if self.counts is None else self.counts.whole
        share = advantage[counted] / (positions * thoughts.shape[2] * length).clamp(min=1)
        head = model.language_head()
        total, _ = head.log_prob_sum(
            policy[counted].flatten(0, 1).to(head.dtype),
            thoughts[counted].flatten(),
            share.repeat_interleave(length),
            temperature=self.reinforce_temperature,
        )
        return -total

    def policy_entropy(self, model: QuietStarModel, policy: Tensor, thoughts: Tensor, whole: Tensor) -> Tensor:
        """The mean entropy of what the sampled tokens are drawn from, at temperature 1, nats, with its gradient.

        The arguments are those of :meth:`policy_loss`. Logits exist for some rows at a time, as there.
        """
        positions = whole.sum() if self.counts is None else self.counts.whole
        tokens = thoughts.masked_fill(~whole[..., None, None], IGNORED).flatten()  # no token: a row that is left out
        head = model.language_head()
        entropy = head.entropy(policy.flatten(0, 3).to(head.dtype), tokens)
        return mean(entropy, positions * thoughts.shape[2:].numel())


def mean(values: Tensor, count: Tensor) -> Tensor:
    """The mean of ``values``, 0 where they do not count, over ``count`` ``[]`` of them."""
    return values.sum() / count.clamp(min=1)
