"""Draws from chunks of logits by the Triton kernels: the twin of ``../torch/draws.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, run_all
from qstar_kernels.lm_head.logits import TILE, LogitMap
from qstar_kernels.lm_head.triton.rows import Rows
from qstar_kernels.lm_head.triton.sample_kernels import draw_kernel, weigh_tiles_kernel


class Draws:
    """Draws from chunks of logits."""

    def __init__(self, head: Rows, logit_map: LogitMap, temperature: float, seed: int | Tensor, step: int | Tensor):
        self.head = head
        self.seed, self.step = signed(seed), signed(step)
        self.greedy = temperature == 0
        self.ratio = 1.0 if self.greedy else logit_map.temperature / temperature

    def draw(self, y: Tensor, rows: range | Tensor) -> tuple[Tensor, Tensor]:
        """tokens and log_prob of rows with the numbers ``rows``, contiguous if in memory."""
        tokens, log_prob = y.new_empty(len(y), dtype=torch.int64), y.new_empty(len(y))
        run_all(self.launches(y, rows, tokens, log_prob), y)
        return tokens, log_prob

    def launches(self, y: Tensor, rows: range | Tensor, tokens: Tensor, log_prob: Tensor) -> list[Launch]:
        vocabulary = len(self.head.weight)
        shape = len(y), -(-vocabulary // TILE)
        masses = {
            "tops": y.new_empty(shape),
            "masses": y.new_empty(shape, dtype=torch.int64),
            "draw_masses": None if self.ratio == 1 else y.new_empty(shape, dtype=torch.int64),
            "tiles": shape[1],
            "ratio": self.ratio,
            "TILE": TILE,
        }
        draw = {
            "tokens": tokens,
            "log_prob": log_prob,
            "unit": 2.0 ** (62 - vocabulary.bit_length()),
            "seed": self.seed,
            "step": self.step,
            "rows": rows if isinstance(rows, Tensor) else rows.start,
            "GREEDY": self.greedy,
            "SEED_IN_MEMORY": isinstance(self.seed, Tensor),
            "STEP_IN_MEMORY": isinstance(self.step, Tensor),
            "ROWS_IN_MEMORY": isinstance(rows, Tensor),
        }
        return [
            self.head.launch("weigh_tiles", weigh_tiles_kernel, y, masses),
            self.head.launch("draw", draw_kernel, y, masses | draw),
        ]


def signed(value: int | Tensor) -> int | Tensor:
    """The low 64 bits as the kernels take them."""
    return value if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63
