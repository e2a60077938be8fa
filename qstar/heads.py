"""The mixing head, which weighs a thought, and the output head of the model as the ops take it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qstar_kernels import faster_linear, linear, linear_log_prob, linear_log_prob_sum, mix_hidden, sample_linear

CHUNK_ELEMENTS = 2**24  # of logits that a divergence holds at once: 64 MB in fp32


class MixingHead(nn.Module):
    """The weight of a thought: an MLP on [base state; post-thought state], 2E -> E -> E -> 1 (paper, section 4.4).

    The last layer starts at zero, so that an untrained head leaves the base model's predictions as they are.
    """

    def __init__(self, width: int, **factory: Any):
        super().__init__()
        self.input = nn.Linear(2 * width, width, **factory)
        self.hidden = nn.Linear(width, width, **factory)
        self.output = nn.Linear(width, 1, bias=False, **factory)
        nn.init.zeros_(self.output.weight)

    def features(self, base: Tensor, thought: Tensor, base_index: Tensor) -> Tensor:
        """What the last layer reads, ``[R, E]``, from base ``[Rb, E]``, thought ``[R, E]`` and base_index ``[R]``.

        The first layer is linear in both states: its part on the base is computed once per text position.
        """
        width = base.shape[-1]
        with faster_linear(thought):
            from_base = F.linear(base, self.input.weight[:, :width], self.input.bias)
            from_thought = F.linear(thought, self.input.weight[:, width:])
            shared = F.embedding(base_index, from_base)  # whose backward adds in one order, unlike that of an index
            return F.relu(self.hidden(F.relu(shared + from_thought)))

    def forward(
        self, base: Tensor, thought: Tensor, base_index: Tensor, sigmoid: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Mixed states ``[R, E]`` and weights ``[R]``, at least fp32, see :func:`qstar_kernels.mix_hidden`.

        A young head's weight is far below what 16 bits resolve beside 1: mixed in them, rewards would be noise.
        """
        features = self.features(base, thought, base_index)
        dtype = torch.promote_types(base.dtype, torch.float32)
        weight = self.output.weight[0].to(features.dtype)
        return mix_hidden(base.to(dtype), thought.to(dtype), features, weight, base_index=base_index, sigmoid=sigmoid)


class ThoughtAlone(nn.Module):
    """In the place of a mixing head where there is none: the weight of every thought is 1, and nothing learns."""

    def forward(
        self, base: Tensor, thought: Tensor, base_index: Tensor, sigmoid: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`MixingHead.forward`: the states after the thoughts, and ones."""
        states = thought.to(torch.promote_types(thought.dtype, torch.float32))
        return states, torch.ones_like(states[:, 0])


@dataclass(frozen=True)
class LanguageHead:
    """The output head as the ops take it: ``z = softcap(logit_scale * (h W^T + bias))``, thought tokens forbidden.

    ``dtype`` is that of a GPU's products. Float32 states are scored exactly all the same, at the price of a product
    more; ``states.to(head.dtype)`` saves it where differences between rows do not matter.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    forbidden: Tensor
    dtype: torch.dtype

    @property
    def _options(self) -> dict[str, Any]:
        return dict(bias=self.bias, logit_scale=self.logit_scale, softcap=self.softcap, forbidden=self.forbidden)

    def _operand(self, hidden: Tensor) -> Tensor:
        return hidden.to(torch.promote_types(hidden.dtype, self.dtype))

    @functools.cached_property
    def _drawing_weight(self) -> Tensor:
        """The weight in the dtype that products take it in, made once for many draws; a CPU's are never of 16 bits."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.detach().to(self.dtype if self.weight.is_cuda else wide)

    def log_prob(self, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """Log-probabilities ``[R]`` (fp32) of targets ``[R]`` at hidden ``[R, E]``; 0 for ignored targets."""
        options = self._options | dict(temperature=temperature, product_dtype=self.dtype)
        return linear_log_prob(self._operand(hidden), self.weight, targets, **options)

    def entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Entropies ``[R]`` (fp32, nats) of the predictions at hidden ``[R, E]``; 0 for ignored targets ``[R]``."""
        options = self._options | dict(return_entropy=True, product_dtype=self.dtype)
        _, entropy = linear_log_prob(self._operand(hidden), self.weight, targets, **options)
        return entropy

    def log_prob_sum(
        self, hidden: Tensor, targets: Tensor, row_weight: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The differentiable sum of ``row_weight`` ``[R]`` times log-probability, and the log-probabilities ``[R]``."""
        hidden = self._operand(hidden)
        row_weight = row_weight.to(torch.promote_types(hidden.dtype, torch.float32))
        options = self._options | dict(temperature=temperature, product_dtype=self.dtype)
        return linear_log_prob_sum(hidden, self.weight, targets, row_weight, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]``, at least fp32, of hidden ``[..., E]``; those of thought tokens are ``-inf``."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return self._mapped(linear(hidden.to(self._drawing_weight.dtype), self._drawing_weight).to(wide))

    def _mapped(self, z: Tensor) -> Tensor:
        """Logits of products with the weight."""
        z = (z if self.bias is None else z + self.bias) * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * torch.tanh(z / self.softcap)
        return z.index_fill(-1, self.forbidden, -torch.inf)

    def divergence(self, teacher: Tensor, hidden: Tensor, row_weight: Tensor) -> Tensor:
        """A weighted sum of the divergences ``KL(q || p)`` of two predictions, nats, at least fp32.

        Differentiable with respect to ``hidden`` and the head as what predicts p; q is a number. Logits exist for some
        rows at a time, in the forward as in the backward.

        Args:
            teacher: states ``[R, r, E]``; q is the mean of what each of the r predicts, of the probabilities.
            hidden: states ``[R, E]`` that predict p.
            row_weight: ``[R]``; rows of weight 0 are left out.
        """
        wide = torch.promote_types(teacher.dtype, torch.float32)
        weight = self.weight.to(wide)  # once, so that the chunks' gradients add up in this dtype
        rows = row_weight.nonzero().squeeze(1)
        size = max(CHUNK_ELEMENTS // (len(weight) * (teacher.shape[1] + 1)), 1)
        total = weight.new_zeros(())
        for part in rows.split(size):
            states = teacher[part].to(wide), hidden[part].to(wide), row_weight[part].to(wide)
            total = total + checkpoint(self._divergence, *states, weight, use_reentrant=False, preserve_rng_state=False)
        return total

    def _divergence(self, teacher: Tensor, hidden: Tensor, row_weight: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            with torch.no_grad():
                q = self._mapped(linear(teacher, weight)).softmax(-1).mean(1)
            log_p = self._mapped(linear(hidden, weight)).log_softmax(-1)
            log_p = log_p.index_fill(-1, self.forbidden, 0.0)  # where q is 0
            return row_weight @ (torch.xlogy(q, q) - q * log_p).sum(-1)

    def sample(
        self,
        hidden: Tensor,
        *,
        seed: int,
        step: int | Tensor,
        temperature: float,
        row_offset: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Tokens ``[R]`` drawn at ``temperature``, the most probable ones at 0."""
        keys: dict[str, Any] = dict(row_offset=row_offset) if rows is None else dict(rows=rows)
        options = self._options | keys | dict(seed=seed, step=step, temperature=temperature)
        tokens, _ = sample_linear(hidden.to(self.dtype), self._drawing_weight, **options)
        return tokens
