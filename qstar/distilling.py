"""Distil: teach the prediction without a thought what the model predicts with thoughts.

What is learned so costs nothing when the model answers: the plain decoder, which never thinks, says it.
``reference.py`` says the same in plain loops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor
from torch.profiler import record_function

from qstar.grid import IGNORED, Counts
from qstar.layouts import Packed
from qstar.learning import QuietStarOutput, mean
from qstar.model import QuietStarModel
from qstar.talking import mixed_states, read_batch, shares
from qstar.thinking import evaluating, think


@dataclass
class Distillation:
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
        temperature: thoughts are sampled at; 0 is greedy.
        seed, row_offset, counts, max_grid_tokens: as those of :class:`qstar.Objective`.
    """

    likelihood_weight: float = 1.0
    temperature: float = 1.0
    seed: int = 0
    row_offset: int = 0
    counts: Counts | None = None
    max_grid_tokens: int | None = None

    def __call__(
        self,
        model: QuietStarModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        thoughts: Tensor | None = None,
    ) -> QuietStarOutput:
        """Think about a batch, as ``Text.from_inputs`` takes it, or take ``thoughts`` ``[B, N, r, K]`` as given.

        ``nll_talk`` of what is returned is of the next token alone.
        """
        text = read_batch(model, input_ids, attention_mask, labels, position_ids)
        grid = model.grid(input_ids.shape[1], ahead_tokens=1)
        if thoughts is None:
            thoughts = think(
                model, text, grid, temperature=self.temperature, seed=self.seed, row_offset=self.row_offset
            )
        counts = text.counts(grid) if self.counts is None else self.counts
        thought_at = counts.ahead[0]  # positions whose next token is predicted after a thought
        head, targets = model.language_head(), text.targets
        with torch.no_grad(), evaluating(model):
            states = mixed_states(model, text, grid, thoughts, self.max_grid_tokens)
            teacher = states.mixed.squeeze(3).flatten(0, 1)
            log_talk = head.log_prob(teacher.flatten(0, 1), repeat(targets, "b n -> (b n r)", r=grid.rationales))
        with record_function("qstar::distil"):
            student = model.read(text.tokens, text.positions, Packed(slots=1, start=text.start)).flatten(0, 1)
            weight = shares(targets, counts.text).flatten()
            total, _ = head.log_prob_sum(student.to(teacher.dtype), targets.flatten(), weight)
            divergence = head.divergence(teacher, student, shares(targets, thought_at).flatten())
        return QuietStarOutput(
            loss=divergence - self.likelihood_weight * total,
            divergence=divergence,
            nll_base=-total,
            nll_talk=-mean(log_talk, thought_at * grid.rationales),
            mixing_weight=mean(states.weight.squeeze(3).mean(2) * (targets != IGNORED), thought_at),
            thoughts=thoughts,
        )
