"""What happens to a chunk's rows between its products, by the Triton kernels: the twin of ``../torch/rows.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.common.launch import Launch, architecture_of, run_all
from qstar_kernels.lm_head.logits import LogitMap, add_product
from qstar_kernels.lm_head.triton.row_kernels import gradient_kernel, score_kernel
from qstar_kernels.lm_head.triton.tiles import find_tile

COLUMN_MULTIPLE = 16  # keeps rows of logits and of their gradients aligned, as matrix libraries want them


class Rows:
    """A head, whose ``weight`` has been through ``as_operand``, and the rows of its logits: twin of torch's."""

    column_multiple = COLUMN_MULTIPLE

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        forbidden: Tensor | None,
        logit_map: LogitMap,
        architecture: str | None = None,
    ):
        temperature, logit_scale, softcap = logit_map
        self.weight = weight
        self.bias = None if bias is None else bias.contiguous()
        self.forbidden = forbidden
        self.gain = logit_scale / (temperature if softcap is None else softcap)
        self.cap = None if softcap is None else softcap / temperature
        self.slope = logit_scale / temperature
        self.architecture = architecture or architecture_of(weight.device)

    def multiply(self, factors: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Fill the first V columns of ``y`` with h W^T, the forbidden ones with -inf; the rest is for the kernels."""
        for index, factor in enumerate(factors):
            add_product(y[:, : len(self.weight)], factor, self.weight.T, beta=float(index > 0))
        return y if self.forbidden is None else y.index_fill_(1, self.forbidden, -torch.inf)

    def score(self, y: Tensor, targets: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """log_prob and entropy of every row."""
        log_prob = y.new_empty(len(y))
        entropy = y.new_empty(len(y)) if want_entropy else None
        run_all([self.score_launch(y, targets, log_prob, entropy)], y)
        return log_prob, entropy

    def gradient(
        self,
        y: Tensor,
        targets: Tensor,
        d_log_prob: Tensor,
        d_entropy: Tensor | None,
        entropy: Tensor | None,
        log_prob: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The gradient of h W^T + bias in ``dtype``, in the memory of ``y``; fills log_prob, if any."""
        d_logits = y.view(dtype)[:, : len(self.weight)]
        run_all([self.gradient_launch(y, targets, d_log_prob, d_entropy, entropy, log_prob, d_logits)], y)
        return d_logits

    def score_launch(self, y: Tensor, targets: Tensor, log_prob: Tensor, entropy: Tensor | None) -> Launch:
        arguments = {"targets": targets, "log_prob": log_prob, "entropy": entropy}
        return self.launch("score", score_kernel, y, arguments)

    def gradient_launch(self, y, targets, d_log_prob, d_entropy, entropy, log_prob, d_logits: Tensor) -> Launch:
        arguments = {
            "targets": targets,
            "d_log_prob": d_log_prob,
            "d_entropy": d_entropy,
            "entropy": entropy,
            "log_prob": log_prob,
            "d_logits": d_logits,
            "d_row_stride": d_logits.stride(0),
            "slope": self.slope,
        }
        return self.launch("gradient", gradient_kernel, y, arguments)

    def launch(self, name: str, kernel, y: Tensor, arguments: dict) -> Launch:
        """A program for each row of ``y``."""
        shared = {
            "logits": y,
            "bias": self.bias,
            "vocabulary": len(self.weight),
            "width": y.shape[1],
            "gain": self.gain,
            "cap": self.cap,
        }
        tile = find_tile(name, self.architecture, self.weight.dtype, len(self.weight))
        return Launch(kernel, len(y), shared | arguments, tile)
