"""Draws from chunks of logits in plain PyTorch, see ``sample.py``: first a tile of columns, then a column of it."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.common.random_bits import row_uniforms
from qstar_kernels.lm_head.logits import TILE, LogitMap
from qstar_kernels.lm_head.torch.rows import Rows


def pick(mass: Tensor, uniform: Tensor) -> Tensor:
    """Index ``[R, 1]`` of the column of ``mass [R, n]`` drawn by ``uniform [R]``."""
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.clamp_(max=mass.shape[1] - 1)  # reached by rows of NaN only


def draw_columns(p: Tensor, tile_uniform: Tensor, column_uniform: Tensor) -> Tensor:
    """A column ``[R, 1]`` of ``p [R, tiles * TILE]`` for each row."""
    if p.shape[1] == TILE:
        return pick(p, column_uniform)
    tiles = p.unflatten(1, (-1, TILE))
    tile = pick(tiles.sum(-1), tile_uniform)
    columns = tiles.gather(1, tile[:, :, None].expand(-1, -1, TILE)).squeeze(1)
    return tile * TILE + pick(columns, column_uniform)


class Draws:
    """Draws from chunks of logits; one buffer serves all."""

    def __init__(self, head: Rows, logit_map: LogitMap, temperature: float, seed: int | Tensor, step: int | Tensor):
        self.last = head.weight.shape[0] - 1
        self.temperature, self.log_prob_temperature = temperature, logit_map.temperature
        self.seed, self.step = seed, step
        self.scratch = None

    def draw(self, y: Tensor, rows: range | Tensor) -> tuple[Tensor, Tensor]:
        """tokens and log_prob of rows with the numbers ``rows``; overwrites ``y``."""
        one_softmax = self.temperature == self.log_prob_temperature
        if self.temperature == 0:
            token = y.argmax(-1, keepdim=True)
        else:
            if self.scratch is None:
                self.scratch = y if one_softmax else torch.empty_like(y)
            ratio = self.log_prob_temperature / self.temperature
            p = y if one_softmax else torch.mul(y, ratio, out=self.scratch[: y.shape[0]])
            torch.softmax(p, -1, out=p)
            token = draw_columns(p, *row_uniforms(self.seed, self.step, rows, y.device))
        token.clamp_(max=self.last)
        log_p = p.gather(1, token).log_() if one_softmax else torch.log_softmax(y, -1, out=y).gather(1, token)
        return token.squeeze(1), log_p.squeeze(1)
