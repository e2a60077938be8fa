"""Distil: teach the prediction without a thought what the model predicts with thoughts.

What is learned so costs nothing when the model answers: the plain decoder, which never thinks, says it.
``reference.py`` says the same in plain loops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import repeat
from torch import Tensor
from torch.profiler import record_function

from qstar.grid import IGNORED
from qstar.layouts import Packed
from qstar.learning import QuietStarOutput, Thinker, mean
from qstar.model import QuietStarModel
from qstar.talking import mixed_states, read_batch, shares
from qstar.thinking import evaluating


@dataclass(kw_only=True)
class Distillation(Thinker):
    """The objective of a stage that distils; calling it thinks, and returns the loss.

    The teacher is the model itself, with its thoughts: at a position i the mixed prediction of talk step 0, averaged in
    probability over the rationales. The student is its prediction without a thought. With u the base state, p a
    rationale and mixed[p,i] the mix of u[i] and the state of the thought's end token::

        q[i] = mean over p of softmax(head(mixed[p,i]))                               no gradient
        L    = NLL_base + mean over i of KL(q[i] || softmax(head(u[i])))              where x_{i+1} is to be predicted

    The teacher moves with what it teaches: the state u is a part of its mix, and the likelihood of the text is all that
    holds both. No thought is rewarded.

    Attributes:
        likelihood_weight: of NLL_base; with 0 the divergence alone is learned from.
    """

    likelihood_weight: float = 1.0

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
        """Think about a batch, or take thoughts as given, both as :class:`qstar.Objective` does.

        ``nll_talk`` of what is returned is of the next token alone.
        """
        text = read_batch(model, input_ids, attention_mask, labels, position_ids)
        grid, thoughts = self.thoughts_about(model, text, thoughts, positions)
        grid = replace(grid, ahead_tokens=1)
        counts = text.counts(grid) if self.counts is None else self.counts
        thought_at = counts.ahead[0]  # positions whose next token is predicted after a thought
        head, targets = model.language_head(), grid.at_chosen(text.targets)
        with torch.no_grad(), evaluating(model):
            states = mixed_states(model, text, grid, thoughts, self.max_grid_tokens)
            teacher = states.mixed.squeeze(3).flatten(0, 1)
            log_talk = head.log_prob(teacher.flatten(0, 1), repeat(targets, "b n -> (b n r)", r=grid.rationales))
        with record_function("qstar::distil"):
            base = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start))
            weight = shares(text.targets, counts.text).flatten()
            total, _ = head.log_prob_sum(base.flatten(0, 1).to(teacher.dtype), text.targets.flatten(), weight)
            student = grid.states_at_chosen(base).flatten(0, 1)
            divergence = head.divergence(teacher, student, shares(targets, thought_at).flatten())
        return QuietStarOutput(
            loss=divergence - self.likelihood_weight * total,
            divergence=divergence,
            nll_base=-total,
            nll_talk=-mean(log_talk, thought_at * grid.rationales),
            mixing_weight=mean(states.weight.squeeze(3).mean(2) * (targets != IGNORED), thought_at),
            thoughts=thoughts,
            positions=grid.chosen,
        )
