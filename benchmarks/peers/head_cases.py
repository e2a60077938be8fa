"""What the head's benchmark times: sizes, inputs, the work that each call has to do, and what it must give.

A product of N rows takes 2 N V E operations. The likelihood's forward and backward need three for a row with a gradient
and one for a row that is only scored; a draw needs one; mixing is bound by its bytes, each input read once and each
result written once per pass.

What must come out is known in float64 for ``CHECKED`` rows, and the gradient of the weight for as many of its rows; it
takes the other rows' normalisers from float32 sums of products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lab.device_limits import Limits
from qstar_kernels import reference
from qstar_kernels.testing import relative_error

RATIONALES, SCORED_TOKENS = 2, 4
CHECKED = 64
CHUNK_ELEMENTS = 2**27  # of what the checks hold at once
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # for sanity, as in attention_cases
LARGEST_DISAGREEMENT = 1e-2  # of draws by the same bits, from products that round differently


class Work(NamedTuple):
    """One pass at one size.

    Attributes:
        kind: ``likelihood``, forward and backward with the rows' weights known; ``half_the_rows``, the same where the
            second half has weight 0; ``sample``; ``mix``, forward and backward, which has no vocabulary.
    """

    kind: str
    rows: int
    width: int
    vocabulary: int = 0

    @property
    def scored(self) -> int:
        """Rows with a gradient, the first ones."""
        return self.rows // 2 if self.kind == "half_the_rows" else self.rows

    @property
    def label(self) -> str:
        vocabulary = f", V {self.vocabulary}" if self.vocabulary else ""
        return f"{self.kind}: N {self.rows}, E {self.width}{vocabulary}"

    def useful_flops(self) -> float:
        product = 2 * self.vocabulary * self.width
        return product * (self.rows if self.kind == "sample" else self.rows + 2 * self.scored)

    def necessary_bytes(self, item_size: int) -> float:
        if self.kind == "mix":
            base_rows = self.rows // (RATIONALES * SCORED_TOKENS)
            # base, thought, features -> mixed, w; then those and d_mixed -> d_base, d_thought, d_features
            states = (base_rows + 3 * self.rows) + (2 * base_rows + 5 * self.rows)
            return states * self.width * item_size + 2 * self.rows * (4 + 8)
        states = (self.rows + self.vocabulary) * self.width * item_size
        return states if self.kind == "sample" else 2 * states

    def result_bytes(self, item_size: int) -> int:
        """Of what a call must hold in the end; a gradient of the weight counts in float32, in which it is summed."""
        if self.kind == "sample":
            return self.rows * (8 + 4)
        if self.kind == "mix":
            base_rows = self.rows // (RATIONALES * SCORED_TOKENS)
            return (base_rows + 3 * self.rows + 1) * self.width * item_size + 4 * self.rows
        return self.rows * self.width * item_size + 4 * self.vocabulary * self.width

    def bound(self, limits: Limits, item_size: int) -> dict[str, float]:
        """Milliseconds that no call can beat, and those of its operations and of its bytes alone."""
        matrix = self.useful_flops() / limits.matrix_flops
        memory = self.necessary_bytes(item_size) / limits.bandwidth
        return {"bound_ms": 1e3 * max(matrix, memory), "matrix_ms": 1e3 * matrix, "memory_ms": 1e3 * memory}


def works_of(rows: int, width: int, vocabulary: int, sampled: tuple[int, ...]) -> Iterator[Work]:
    for kind in ("likelihood", "half_the_rows"):
        yield Work(kind, rows, width, vocabulary)
    for count in sampled:
        yield Work("sample", count, width, vocabulary)


SIZES = {  # the most telling first, since time may run out
    "cpu": [*works_of(2048, 256, 4096, (2048,)), Work("mix", 2048, 256), *works_of(512, 256, 32768, (512,))],
    "cuda": [
        *works_of(32768, 4096, 128256, (4096, 32768)),
        Work("mix", 32768, 4096),
        *works_of(32768, 4096, 32000, (4096, 32768)),
        *works_of(32768, 2048, 128256, (4096, 32768)),
        *works_of(32768, 2048, 32000, (4096, 32768)),
        Work("mix", 32768, 2048),
    ],
}
QUICK = {"cpu": 4, "cuda": 5}  # works of a quick run


class Inputs:
    """Random states and what is asked of them. Logits have a standard deviation of 1."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device):
        self.work, self.dtype, self.device = work, dtype, device
        self.generator = torch.Generator(device).manual_seed(0)

    def states(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def checked(self, size: int) -> Tensor:
        """Indices, the last among them: overflows show there first."""
        return torch.linspace(0, size - 1, min(CHECKED, size), device=self.device).round().long()

    def largest_error(self, names: str, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
        errors = [relative_error(x, right) for x, right in zip(actual, expected, strict=True)]
        limit = LARGEST_ERROR[self.dtype]
        if not max(errors) <= limit:
            listed = ", ".join(f"{error:.1e}" for error in errors)
            raise ArithmeticError(f"wrong: relative errors of {names} are {listed}; the limit is {limit:.0e}")
        return max(errors)


class Head(Inputs):
    """``hidden [N, E]`` and ``weight [V, E]``."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device):
        super().__init__(work, dtype, device)
        self.hidden = self.states(work.rows, work.width)
        self.weight = self.states(work.vocabulary, work.width).mul_(work.width**-0.5)

    def logits(self, rows: Tensor) -> Tensor:
        """Those of a few rows, in float64."""
        h = self.hidden.detach()[rows].double()
        columns = self.weight.detach().split(max(1, CHUNK_ELEMENTS // self.work.width))
        return torch.cat([h @ part.double().T for part in columns], dim=1)

    def check_products(self, results: tuple[Tensor, ...]) -> float:
        """Of the bare products only the logits are known."""
        rows = self.checked(self.work.rows)
        return self.largest_error("logits", (results[0][rows],), (self.logits(rows),))


class Likelihood(Head):
    """loss = - sum of ``row_weight`` log_prob; the weights are those of a mean over the scored rows."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device):
        super().__init__(work, dtype, device)
        self.leaves = (self.hidden.requires_grad_(), self.weight.requires_grad_())
        self.targets = torch.randint(work.vocabulary, (work.rows,), generator=self.generator, device=device)
        scored = torch.arange(work.rows, device=device) < work.scored
        self.row_weight = scored.float() / work.scored
        self.scored_targets = self.targets.where(scored, -100)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """loss, d_hidden and d_weight."""
        return (loss, *torch.autograd.grad(loss, self.leaves))

    @cached_property
    def log_normaliser(self) -> Tensor:
        """Of every row."""
        parts = []
        for h in self.hidden.detach().split(max(1, CHUNK_ELEMENTS // self.work.vocabulary)):
            weight = self.weight.detach().T
            z = torch.mm(h, weight, out_dtype=torch.float32) if h.dtype != torch.float32 else h @ weight
            parts.append(z.logsumexp(-1).double())
        return torch.cat(parts)

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """loss, and the checked rows of d_hidden and d_weight."""
        hidden, weight = (x.detach() for x in self.leaves)
        chunks = torch.arange(self.work.rows, device=self.device).split(max(1, CHUNK_ELEMENTS // self.work.width))
        label = torch.cat([(hidden[rows].double() * weight[self.targets[rows]]).sum(-1) for rows in chunks])
        row_weight = self.row_weight.double()
        loss = (row_weight * (self.log_normaliser - label)).sum()

        rows = self.checked(self.work.rows)
        p = self.logits(rows).softmax(-1)
        columns = weight.split(max(1, CHUNK_ELEMENTS // self.work.width))
        pull = sum(
            part @ w.double() for part, w in zip(p.split([len(w) for w in columns], dim=1), columns, strict=True)
        )
        d_hidden = row_weight[rows, None] * (pull - weight[self.targets[rows]].double())

        tokens = self.checked(self.work.vocabulary)
        d_weight = 0.0
        for chunk in chunks:
            h = hidden[chunk].double()
            p = (h @ weight[tokens].double().T - self.log_normaliser[chunk, None]).exp()
            d_logits = row_weight[chunk, None] * (p - (self.targets[chunk, None] == tokens).double())
            d_weight += d_logits.T @ h
        return loss, d_hidden, d_weight

    def check(self, _: str, results: tuple[Tensor, ...]) -> float:
        loss, d_hidden, d_weight = results
        found = (loss, d_hidden[self.checked(len(d_hidden))], d_weight[self.checked(len(d_weight))])
        return self.largest_error("loss, d_hidden, d_weight", found, self.expected)


class Sampling(Head):
    """A token for every row, and its log-probability."""

    @cached_property
    def log_p(self) -> Tensor:
        return self.logits(self.checked(self.work.rows)).log_softmax(-1)

    def check(self, name: str, results: tuple[Tensor, Tensor]) -> float:
        tokens, log_prob = results
        if not (tokens.min() >= 0 and tokens.max() < self.work.vocabulary):
            raise ArithmeticError(f"wrong: tokens are in [{tokens.min()}, {tokens.max()}]")
        if name == "ours":
            self.drawn = tokens
        elif name == "epilogue":
            differ = (tokens != self.drawn).double().mean().item()
            if differ > LARGEST_DISAGREEMENT:
                raise ArithmeticError(f"wrong: {differ:.1%} of the tokens are not those that the same bits draw")
        rows = self.checked(self.work.rows)
        return self.largest_error("log_prob", (log_prob[rows],), (self.log_p.gather(1, tokens[rows, None])[:, 0],))


class Mixing(Inputs):
    """States of every scored token of every rationale of a position, and those before the thought."""

    def __init__(self, work: Work, dtype: torch.dtype, device: torch.device):
        super().__init__(work, dtype, device)
        shared = RATIONALES * SCORED_TOKENS
        head_weight = self.states(work.width).mul_(work.width**-0.5)
        states = (self.states(work.rows // shared, work.width), *(self.states(work.rows, work.width) for _ in range(2)))
        self.leaves = tuple(x.requires_grad_() for x in (*states, head_weight))
        self.base_index = torch.arange(work.rows, device=device) // shared
        self.d_mixed = self.states(work.rows, work.width)
        self.d_w = torch.randn(work.rows, generator=self.generator, device=device)

    def gradients(self, results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return (*results, *torch.autograd.grad(results, self.leaves, (self.d_mixed, self.d_w)))

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        leaves = [x.detach().double().requires_grad_() for x in self.leaves]
        mixed, w = reference.mix_hidden(*leaves, base_index=self.base_index, sigmoid=True)
        upstream = (self.d_mixed.double(), self.d_w.double())
        return (mixed.detach(), w.detach(), *torch.autograd.grad((mixed, w), leaves, upstream))

    def check(self, _: str, results: tuple[Tensor, ...]) -> float:
        return self.largest_error("mixed, w, d_base, d_thought, d_features, d_head_weight", results, self.expected)


INPUTS: dict[str, Callable[..., Inputs]] = {
    "likelihood": Likelihood,
    "half_the_rows": Likelihood,
    "sample": Sampling,
    "mix": Mixing,
}
