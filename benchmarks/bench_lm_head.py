"""The language-model head against plain logits: time ratios of rounds taken in turn, and peak memory."""

import statistics
import time

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qstar_kernels import linear_log_prob, sample_linear

SHAPES = [(2048, 4096, 256), (512, 32768, 256)]  # rows, vocabulary, width


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once in the storages made within it."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in given:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def compare(benchmark, contenders: dict, rounds: int) -> None:
    """Time the first contender, and beside it the ratio of every other to it, in rounds that run them in turn."""
    names = list(contenders)
    seconds = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    warm = {name: values[1:] for name, values in seconds.items()}
    for name in names:
        with PeakBytes() as watch:
            contenders[name]()
        benchmark.extra_info[f"peak_mib_{name}"] = round(watch.peak / 2**20, 1)
        benchmark.extra_info[f"median_ms_{name}"] = round(1e3 * statistics.median(warm[name]), 1)
    for name in names[1:]:
        ratios = [other / ours for other, ours in zip(warm[name], warm[names[0]], strict=True)]
        benchmark.extra_info[f"speedup_over_{name}"] = round(statistics.median(ratios), 2)
    benchmark.pedantic(contenders[names[0]], rounds=2)


def make_inputs(rows: int, vocabulary: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) * width**-0.5).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,))


@pytest.mark.parametrize(("rows", "vocabulary", "width"), SHAPES)
@pytest.mark.parametrize("scored", [1.0, 0.5], ids=["all_rows", "half_the_rows"])
def test_log_prob_forward_backward(benchmark, rows, vocabulary, width, scored):
    """``half_the_rows``: the other half has an upstream gradient of 0, as in the policy term."""
    hidden, weight, targets = make_inputs(rows, vocabulary, width)
    row_weight = (torch.arange(rows) < scored * rows).float() / rows

    def gradients(loss):
        return torch.autograd.grad(loss, (hidden, weight))

    def ours():
        return gradients(-linear_log_prob(hidden, weight, targets) @ row_weight)

    def logits_and_cross_entropy():
        return gradients(F.cross_entropy(hidden @ weight.T, targets, reduction="none") @ row_weight)

    def torch_linear_cross_entropy():
        return gradients(F.linear_cross_entropy(hidden, weight, targets, reduction="none") @ row_weight)

    for mine, plain in zip(ours(), logits_and_cross_entropy(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())
    contenders = {"ours": ours, "logits": logits_and_cross_entropy}
    if hasattr(F, "linear_cross_entropy"):
        contenders["torch_linear_cross_entropy"] = torch_linear_cross_entropy
    compare(benchmark, contenders, rounds=3)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), SHAPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sample(benchmark, rows, vocabulary, width, temperature):
    hidden, weight, _ = make_inputs(rows, vocabulary, width)
    generator = torch.Generator()

    def ours():
        return sample_linear(hidden, weight, seed=0, temperature=temperature)

    @torch.no_grad()
    def logits_and_multinomial():
        z = hidden @ weight.T
        if temperature:
            tokens = torch.multinomial((z / temperature).softmax(-1), 1, generator=generator)
        else:
            tokens = z.argmax(-1, keepdim=True)
        return tokens[:, 0], z.log_softmax(-1).gather(1, tokens)[:, 0]

    tokens, log_prob = ours()
    plain = (hidden @ weight.T).detach().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_prob, plain, rtol=1e-5, atol=1e-5)
    compare(benchmark, {"ours": ours, "logits": logits_and_multinomial}, rounds=3)
