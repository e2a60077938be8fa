"""The language-model head against plain logits: time ratios of rounds taken in turn, and peak memory."""

import pytest
import torch
from paired import compare
from torch.nn import functional as F

from qstar_kernels import linear_log_prob, linear_log_prob_sum, sample_linear

SHAPES = [(2048, 4096, 256), (512, 32768, 256)]  # rows, vocabulary, width


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

    def one_pass():
        return gradients(-linear_log_prob_sum(hidden, weight, targets, row_weight)[0])

    def logits_and_cross_entropy():
        return gradients(F.cross_entropy(hidden @ weight.T, targets, reduction="none") @ row_weight)

    def torch_linear_cross_entropy():
        return gradients(F.linear_cross_entropy(hidden, weight, targets, reduction="none") @ row_weight)

    for mine in (ours(), one_pass()):
        for gradient, plain in zip(mine, logits_and_cross_entropy(), strict=True):
            torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())
    contenders = {"ours": ours, "ours_in_one_pass": one_pass, "logits": logits_and_cross_entropy}
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
