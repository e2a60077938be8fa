"""What happens to a chunk's rows between its products, in plain PyTorch.

y = softcap(logit_scale (h W^T + bias)) / temperature, forbidden columns at -inf
log_prob = y[target] - logsumexp(y)           p = softmax(y)           entropy = - sum_v p log p

d y = d_log_prob (onehot(target) - p) - d_entropy p (log p + entropy)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qstar_kernels.lm_head.logits import LogitMap, add_product


class Rows:
    """A head, whose ``weight`` has been through ``as_operand``, and the rows of its logits."""

    column_multiple = 1

    def __init__(self, weight: Tensor, bias: Tensor | None, forbidden: Tensor | None, logit_map: LogitMap):
        self.weight = weight
        self.bias = bias
        self.forbidden = forbidden
        self.logit_map = logit_map

    def multiply(self, factors: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Fill ``y``, whose columns beyond V are at -inf."""
        temperature, logit_scale, softcap = self.logit_map
        gain = logit_scale / (temperature if softcap is None else softcap)
        vocabulary = self.weight.shape[0]
        logits = y[:, :vocabulary]
        if self.bias is not None:
            logits.copy_(self.bias)
        for index, factor in enumerate(factors):
            beta = 1.0 if index else 0.0 if self.bias is None else gain
            add_product(logits, factor, self.weight.T, alpha=gain, beta=beta)
        if softcap is not None:
            logits.tanh_().mul_(softcap / temperature)
        if vocabulary < y.shape[1]:
            y[:, vocabulary:] = -torch.inf
        return y if self.forbidden is None else y.index_fill_(1, self.forbidden, -torch.inf)

    def score(self, y: Tensor, targets: Tensor, want_entropy: bool) -> tuple[Tensor, Tensor | None]:
        """log_prob and entropy of every row; overwrites ``y``."""
        log_p = torch.log_softmax(y, -1, out=y)
        log_prob = log_p.gather(1, targets[:, None]).squeeze(1)
        if not want_entropy:
            return log_prob, None
        p = log_p.exp()
        return log_prob, torch.special.entr(p, out=p).sum(-1)

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
        """The gradient of h W^T + bias in ``dtype``; overwrites ``y`` and fills log_prob, if any."""
        temperature, logit_scale, softcap = self.logit_map
        gain = logit_scale / temperature
        slope = None if softcap is None else (y * (temperature / softcap)).square_().neg_().add_(1.0)
        column = targets[:, None]
        from_label = (d_log_prob * -gain)[:, None]
        if log_prob is None and d_entropy is None:
            p = torch.softmax(y, -1, out=y)
        else:
            log_p = torch.log_softmax(y, -1, out=y)
            if log_prob is not None:
                torch.gather(log_p, 1, column, out=log_prob[:, None])
            p = log_p.exp_() if d_entropy is None else log_p.exp()
        if d_entropy is None:
            d_logits = p.scatter_(1, column, p.gather(1, column) - 1.0).mul_(from_label)
        else:
            log_p.clamp_(min=torch.finfo(log_p.dtype).min)  # times p = 0 that is 0, minus infinity would not be
            d_logits = log_p.add_(entropy[:, None]).mul_(p).mul_((d_entropy * -gain)[:, None])
            d_logits.addcmul_(p.scatter_(1, column, p.gather(1, column) - 1.0), from_label)
        if slope is not None:
            d_logits.mul_(slope)
        if self.forbidden is not None and slope is not None:
            d_logits.index_fill_(1, self.forbidden, 0.0)
        return d_logits.to(dtype)
