"""Training with pause tokens: the control that thinks nothing, and has all the time of a thought for it.

The same grid and the same likelihood as Quiet-STaR, but every thought is the same: K times the token that opens it.
What is left of a thought is its computation. Goyal et al., 2023, arXiv 2310.02226, in the place of sampled thoughts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qstar.grid import Counts
from qstar.model import QuietStarModel
from qstar.talking import read_batch, talk
from qstar.training.trainer import QuietStarTrainer


def pauses(model: QuietStarModel, *shape: int) -> Tensor:
    """Thoughts that say nothing, ``[*shape, K]`` int64 on the CPU: the token that opens a thought, K times."""
    return torch.full((*shape, model.qstar.thought_tokens), model.qstar.start_token_id)


def pause_loss(model: QuietStarModel, counts: Counts | None = None, **batch: Tensor) -> Tensor:
    """``(NLL_base + NLL_talk) / 2`` of a batch, as Quiet-STaR's, with a pause in the place of each thought.

    Args:
        model: the model.
        counts: what the means are taken over; over this batch by default.
        batch: as :func:`qstar.talking.read_batch` takes it, by name.
    """
    text = read_batch(model, **batch)
    grid = model.grid(text.tokens.shape[1], rationales=1)
    thoughts = pauses(model, *text.tokens.shape, 1).to(text.tokens.device)
    return talk(model, text, grid, thoughts, counts).loss


class PauseTrainer(QuietStarTrainer):
    """The Trainer with a pause in the place of each thought; there is nothing to sample and nothing to reward.

    The model is read with the same pauses, see :func:`pauses`: its folder is that of any model that thinks, which would
    otherwise sample thoughts that it never learned.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the text with pauses, and it as an output as well where asked for."""
        loss = self._as_part(model(**inputs, objective=partial(pause_loss, counts=self.counts)))
        return (loss, {"loss": loss}) if return_outputs else loss
