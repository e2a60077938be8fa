"""What the head is held against: other ways to compute it, and the bare products that all of them need.

Peers that only know the mean over rows with a target get targets of -100 where a row has weight 0. Each has its
library's defaults but where its name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.paired import Call
from lab.results_file import Peer, Unsupported, need_gpu
from peers.head_cases import Head, Likelihood, Mixing, Sampling
from qstar_kernels import linear_log_prob, linear_log_prob_sum, mix_hidden, sample_linear


def imported(module: str, name: str) -> Callable:
    library = module.split(".")[0]
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise Unsupported(f"{library} is not installed" if error.name == library else f"{library}: {error}") from error


# The likelihood, forward and backward. A call gives loss, d_hidden and d_weight.


def prepare_one_pass(x: Likelihood) -> Call:
    return lambda: x.gradients(-linear_log_prob_sum(x.hidden, x.weight, x.targets, x.row_weight)[0])


def prepare_two_passes(x: Likelihood) -> Call:
    return lambda: x.gradients(-linear_log_prob(x.hidden, x.weight, x.targets) @ x.row_weight)


def prepare_logits(x: Likelihood) -> Call:
    """Logits in float32 made of those in the dtype of the states, as models do it."""

    def logits():
        z = (x.hidden @ x.weight.T).float()
        return x.gradients(F.cross_entropy(z, x.targets, reduction="none") @ x.row_weight)

    return logits


def prepare_torch_linear(chunked: bool, x: Likelihood) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unsupported(f"torch {torch.__version__} has no linear_cross_entropy")
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    return lambda: x.gradients(F.linear_cross_entropy(x.hidden, x.weight, x.scored_targets, **options))


def prepare_liger(accumulator: torch.dtype | None, x: Likelihood) -> Call:
    """The weight's gradient is summed in ``accumulator``, by default in its own dtype."""
    need_gpu(x.hidden)
    loss = imported("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")(accum_dtype=accumulator)
    return lambda: x.gradients(loss(x.weight, x.hidden, x.scored_targets))


def prepare_fused(module: str, name: str, x: Likelihood) -> Call:
    need_gpu(x.hidden)
    loss = imported(module, name)
    return lambda: x.gradients(loss(x.hidden, x.weight, x.scored_targets))


def prepare_three_products(x: Likelihood) -> Call:
    """Logits of all rows and both gradients of the scored ones, into memory that is there."""
    hidden, weight = (leaf.detach() for leaf in x.leaves)
    z = hidden.new_empty(len(hidden), len(weight))
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    scored = slice(x.work.scored)

    def products():
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z[scored], weight, out=d_hidden[scored])
        torch.mm(z[scored].T, hidden[scored], out=d_weight)
        return (z,)

    return products


LIGER_SM90 = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90", "liger_fused_linear_cross_entropy_sm90"
LIKELIHOOD_PEERS = [
    Peer("ours", prepare_one_pass),
    Peer("ours_two_passes", prepare_two_passes),
    Peer("logits", prepare_logits),
    Peer("torch_linear", partial(prepare_torch_linear, False)),
    Peer("torch_chunked", partial(prepare_torch_linear, True)),
    Peer("liger", partial(prepare_liger, None)),
    Peer("liger_float32", partial(prepare_liger, torch.float32)),
    Peer("liger_sm90", partial(prepare_fused, *LIGER_SM90)),
    Peer("quack", partial(prepare_fused, "quack.linear_cross_entropy", "chunked_linear_cross_entropy")),
    Peer("products", prepare_three_products),
]


# Draws. A call gives tokens and log_prob.


def prepare_sample(x: Sampling) -> Call:
    return lambda: sample_linear(x.hidden, x.weight, seed=0)


def prepare_epilogue(x: Sampling) -> Call:
    need_gpu(x.hidden)
    from peers.epilogue_sampling import sample_in_epilogue

    return lambda: sample_in_epilogue(x.hidden, x.weight, seed=0)


def gather(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens[:, None])[:, 0]


def prepare_multinomial(x: Sampling) -> Call:
    def multinomial():
        p = (x.hidden @ x.weight.T).float().softmax(-1)
        tokens = torch.multinomial(p, 1)[:, 0]
        return tokens, gather(p, tokens).log_()

    return multinomial


def prepare_gumbel(x: Sampling) -> Call:
    def gumbel():
        z = (x.hidden @ x.weight.T).float()
        tokens = torch.empty_like(z).exponential_().log_().neg_().add_(z).argmax(-1)
        return tokens, gather(z, tokens) - z.logsumexp(-1)

    return gumbel


def prepare_product(x: Head) -> Call:
    z = x.hidden.new_empty(len(x.hidden), len(x.weight))
    return lambda: (torch.mm(x.hidden, x.weight.T, out=z),)


SAMPLE_PEERS = [
    Peer("ours", prepare_sample),
    Peer("epilogue", prepare_epilogue),
    Peer("multinomial", prepare_multinomial),
    Peer("gumbel", prepare_gumbel),
    Peer("products", prepare_product),
]


# Mixing, forward and backward. A call gives mixed, w and the gradients.


def prepare_mix(backend: str, x: Mixing) -> Call:
    return lambda: x.gradients(mix_hidden(*x.leaves, base_index=x.base_index, sigmoid=True, backend=backend))


MIX_PEERS = [Peer("ours", partial(prepare_mix, "auto")), Peer("ours_torch", partial(prepare_mix, "torch"))]


def peers_of(kind: str, device: torch.device) -> list[Peer]:
    """Ours first. On a CPU the backends "auto" and "torch" are the same."""
    if kind == "mix":
        return MIX_PEERS[: 1 if device.type == "cpu" else None]
    return SAMPLE_PEERS if kind == "sample" else LIKELIHOOD_PEERS
