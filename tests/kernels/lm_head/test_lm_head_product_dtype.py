"""Products of 16 bits for states of 32: what small differences between rows survive, and what the gradients round to.

A CPU makes such products in float32, so they are made by hand here as a GPU makes them.
"""

import pytest
import torch

from qstar_kernels import linear_log_prob, linear_log_prob_sum, sample_linear
from qstar_kernels.lm_head import log_prob, logits
from qstar_kernels.lm_head.torch import rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCABULARY, WIDTH = 90, 300, 64
BACKENDS = ["torch"]
try:
    from qstar_kernels.lm_head.triton import rows as rows_by_triton

    BACKENDS.append(pytest.param("triton", marks=pytest.mark.slow))  # in the interpreter
except ModuleNotFoundError:
    rows_by_triton = None


@pytest.fixture
def narrow_products(monkeypatch):
    """16-bit factors, accumulated in float32."""
    if DEVICE == "cuda":
        return

    def add_product(out, a, b, *, alpha=1.0, beta=1.0):
        assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out.dtype == torch.float32
        total = alpha * (a.float() @ b.float())
        return out.copy_(total if beta == 0 else total + beta * out)

    for module in filter(None, (rows, log_prob, rows_by_triton)):
        monkeypatch.setattr(module, "add_product", add_product)
    monkeypatch.setattr(logits, "as_operand", lambda tensor, dtype: tensor.to(dtype))
    monkeypatch.setattr(log_prob, "product", lambda a, b, dtype: (a.float() @ b.float()).to(dtype))


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, device=DEVICE)
    weight = torch.randn(VOCABULARY, WIDTH, device=DEVICE) * WIDTH**-0.5
    return hidden, weight, torch.randint(VOCABULARY, (ROWS,), device=DEVICE)


def exact(hidden, weight, targets):
    return linear_log_prob(hidden.double(), weight.bfloat16().double(), targets, backend="reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_state_loses_in_rounding_is_a_product_of_its_own(narrow_products, backend):
    hidden, weight, targets = inputs()
    wanted = exact(hidden, weight, targets)
    once = linear_log_prob(hidden.bfloat16(), weight, targets, backend=backend)
    split = linear_log_prob(hidden, weight, targets, product_dtype=torch.bfloat16, backend=backend)
    assert (once - wanted).abs().max() > 1e-3
    assert (split - wanted).abs().max() < 2e-5
    summed = linear_log_prob_sum(
        hidden.clone().requires_grad_(), weight, targets, torch.ones(ROWS, device=DEVICE), product_dtype=torch.bfloat16,
        backend=backend,
    )[1]  # fmt: skip
    torch.testing.assert_close(summed, split, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_young_thought_is_rewarded_for_what_it_does(narrow_products, backend):
    hidden, weight, targets = inputs()
    mixed = hidden + 1e-3 * torch.randn_like(hidden)

    def reward(score):
        return score(mixed, weight, targets) - score(hidden, weight, targets)

    def correlation(score):
        return torch.corrcoef(torch.stack([reward(score), reward(exact).float()]))[0, 1]

    def split(*arguments):
        return linear_log_prob(*arguments, product_dtype=torch.bfloat16, backend=backend)

    def rounded(hidden, *arguments):
        return linear_log_prob(hidden.bfloat16(), *arguments, backend=backend)

    assert correlation(split) > 0.999
    assert correlation(rounded) < 0.9


@pytest.mark.parametrize("score", [linear_log_prob, linear_log_prob_sum])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_round_to_the_products_and_come_in_the_dtypes_of_their_inputs(narrow_products, backend, score):
    hidden, weight, targets = inputs()
    row_weight = torch.randn(ROWS, device=DEVICE)
    bias = torch.randn(VOCABULARY, device=DEVICE)

    def gradients(*tensors, **options):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if score is linear_log_prob:
            total = linear_log_prob(*leaves[:2], targets, bias=leaves[2], **options) @ row_weight.to(tensors[0].dtype)
        else:
            dtype = torch.promote_types(tensors[0].dtype, torch.float32)
            total = linear_log_prob_sum(*leaves[:2], targets, row_weight.to(dtype), bias=leaves[2], **options)[0]
        return torch.autograd.grad(total, leaves)

    wanted = gradients(hidden.double(), weight.bfloat16().double(), bias.double(), backend="reference")
    found = gradients(hidden, weight, bias, product_dtype=torch.bfloat16, backend=backend)
    assert [x.dtype for x in found] == [torch.float32] * 3
    for mine, right in zip(found, wanted, strict=True):
        assert 0 < (mine - right).norm() / right.norm() < 4e-3
    of_narrow_weight = gradients(hidden, weight.bfloat16(), bias, product_dtype=torch.bfloat16, backend=backend)
    assert [x.dtype for x in of_narrow_weight] == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.equal(of_narrow_weight[0], found[0])
    assert torch.equal(of_narrow_weight[1], found[1].bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_small_share_of_a_row_outlives_float16(narrow_products, backend, dtype):
    """A loss scale comes with the backward: what the forward has rounded to 0 by then is lost."""
    hidden, weight, targets = inputs()
    hidden = hidden.half().to(dtype)
    row_weight = torch.rand(ROWS, device=DEVICE) * 2.0**-15
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total, _ = linear_log_prob_sum(*leaves, targets, row_weight, product_dtype=torch.float16, backend=backend)
    found = torch.autograd.grad(total * 2**16, leaves)
    wide = hidden.double().requires_grad_(), weight.half().double().requires_grad_()
    total, _ = linear_log_prob_sum(*wide, targets, row_weight.double(), backend="reference")
    for mine, right in zip(found, torch.autograd.grad(total * 2**16, wide), strict=True):
        assert (mine - right).norm() / right.norm() < 1e-3
        assert (mine != 0).double().mean() > 0.99


def test_the_weight_of_16_bit_states_may_be_a_master_copy():
    """Its gradient is then not rounded to 16 bits."""
    hidden, weight, targets = inputs()
    hidden, weight = hidden.bfloat16(), weight.requires_grad_()
    (grad,) = torch.autograd.grad(linear_log_prob(hidden, weight, targets).sum(), weight)
    wide = weight.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(linear_log_prob(hidden.double(), wide, targets).sum(), wide)
    assert grad.dtype == torch.float32
    assert (grad - wanted).norm() / wanted.norm() < (1e-6 if DEVICE == "cpu" else 4e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_from_16_bit_products_are_those_of_exact_ones(narrow_products, backend):
    hidden, weight, _ = inputs()
    tokens, scores = sample_linear(hidden, weight, seed=3, product_dtype=torch.bfloat16, backend=backend)
    rounded = weight.bfloat16().float()
    expected, wanted = sample_linear(hidden, rounded, seed=3, backend="reference")
    assert (tokens == expected).float().mean() > 0.97  # a boundary lies within the rounding of few
    same = tokens == expected
    torch.testing.assert_close(scores[same], wanted[same], rtol=0, atol=1e-4)
