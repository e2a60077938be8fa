"""The one-pass weighted sum of log-probabilities against the two-pass op and the specification."""

import math

import pytest
import torch
from storage_watch import StorageWatch
from wait_watch import WaitWatch

from qstar_kernels import linear_log_prob, linear_log_prob_sum
from qstar_kernels.lm_head import logits
from qstar_kernels.lm_head.log_prob_sum import gradient_unit
from qstar_kernels.testing import assert_close

OPTIONS = [{}, {"temperature": 3.0}, {"logit_scale": 0.3}, {"softcap": 1.5, "temperature": 0.7, "logit_scale": 1.3}]


def make_inputs(rows, vocabulary, width, bias, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(rows, width), (vocabulary, width)] + [(vocabulary,)] * bias
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(vocabulary, (rows,))
    row_weight = torch.randn(rows, dtype=torch.promote_types(dtype, torch.float32))
    return tensors, targets, row_weight


def run(op, tensors, upstream=0.7):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    total, log_prob = op(*leaves)
    assert not log_prob.requires_grad
    return total.detach(), log_prob, *torch.autograd.grad(total * upstream, leaves)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", 150)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("forbidden", [None, [0, 36, 5]])
def test_total_and_gradients_are_the_references(small_chunks, options, bias, forbidden):
    tensors, targets, row_weight = make_inputs(63, 37, 11, bias)
    forbidden = None if forbidden is None else torch.tensor(forbidden)
    if forbidden is not None:
        targets[torch.isin(targets, forbidden)] = 7
    targets[::5] = -100
    row_weight[1::7] = 0

    def op(backend):
        def call(hidden, weight, bias=None):
            return linear_log_prob_sum(
                hidden, weight, targets, row_weight, bias=bias, forbidden=forbidden, backend=backend, **options
            )

        return call

    for ours, wanted in zip(run(op("torch"), tensors), run(op("reference"), tensors), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_worse_than_that_of_the_two_pass_op(dtype):
    tensors, targets, row_weight = make_inputs(100, 211, 33, False, dtype)

    def one_pass(hidden, weight):
        return linear_log_prob_sum(hidden, weight, targets, row_weight.to(accumulator(hidden)))

    def two_pass(hidden, weight):
        log_prob = linear_log_prob(hidden, weight, targets)
        return (log_prob * row_weight.to(log_prob.dtype)).sum(), log_prob.detach()

    def accumulator(tensor):
        return torch.promote_types(tensor.dtype, torch.float32)

    exact = run(two_pass, [tensor.double() for tensor in tensors])
    for ours, other, wanted in zip(run(one_pass, tensors), run(two_pass, tensors), exact, strict=True):
        error, allowed = ((value.double() - wanted).norm() for value in (ours, other))
        assert error <= 1.5 * allowed + 1e-7 * wanted.norm()


def test_every_row_is_multiplied_once_and_one_chunk_is_alive(monkeypatch):
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", 16 * 4096)
    tensors, targets, row_weight = make_inputs(64, 4096, 8, False, torch.float32)
    with StorageWatch(at_least=16 * 4096 * 4) as watch:
        total, _ = linear_log_prob_sum(*tensors, targets, row_weight)
        total.backward()
    forward = [product for product in watch.products if product[1:] == (8, 4096)]
    assert sum(rows for rows, *_ in forward) == 64
    assert watch.most_alive == 1


def test_rows_of_weight_0_are_scored_only():
    tensors, targets, row_weight = make_inputs(64, 300, 8, False)
    row_weight = row_weight * (torch.arange(64) % 3 != 0)
    with StorageWatch(at_least=1) as watch:
        total, log_prob = linear_log_prob_sum(*tensors, targets, row_weight)
        grads = torch.autograd.grad(total, tensors)
    expected = linear_log_prob(*tensors, targets)
    assert_close(log_prob, expected.detach())
    for grad, right in zip(grads, torch.autograd.grad(expected @ row_weight, tensors), strict=True):
        assert_close(grad, right)
    counted = int((row_weight * (targets != -100) != 0).sum())
    assert sum(rows for rows, *shape in watch.products if shape == [8, 300]) == int((targets != -100).sum())
    assert sum(rows for rows, *shape in watch.products if shape == [300, 8]) == counted < 64
    assert sum(inner for rows, inner, columns in watch.products if (rows, columns) == (300, 8)) == counted


def test_saved_gradients_serve_twice():
    tensors, targets, row_weight = make_inputs(9, 13, 5, True)
    hidden, weight, bias = tensors
    total, _ = linear_log_prob_sum(hidden, weight, targets, row_weight, bias=bias)
    first = torch.autograd.grad(total, tensors, retain_graph=True)
    second = torch.autograd.grad(total, tensors)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_without_gradients_nothing_but_the_scores_is_made():
    tensors, targets, row_weight = make_inputs(9, 13, 5, False)
    with torch.no_grad(), StorageWatch(at_least=1) as watch:
        total, log_prob = linear_log_prob_sum(*tensors, targets, row_weight)
    assert len(watch.products) == 1
    assert_close(log_prob, linear_log_prob(*tensors, targets).detach())
    torch.testing.assert_close(total, (log_prob * row_weight).sum())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda weight: weight[:-1], ValueError, r"row_weight has shape \[8\]"),
        (lambda weight: weight.float(), TypeError, "row_weight has dtype torch.float32"),
        (lambda weight: None, TypeError, "row_weight must be a tensor"),
    ],
)
def test_wrong_row_weights_are_named(change, error, message):
    (hidden, weight), targets, row_weight = make_inputs(9, 13, 5, False)
    with pytest.raises(error, match=message):
        linear_log_prob_sum(hidden, weight, targets, change(row_weight))


@pytest.mark.parametrize("differentiates", [True, False])
def test_the_device_is_asked_once(differentiates):
    """For the ids that are wrong and for the rows of each kind; the backward asks nothing."""
    tensors, targets, row_weight = make_inputs(63, 37, 11, False)
    targets[::5], row_weight[1::7] = -100, 0
    forbidden = torch.tensor([36])
    targets[targets == 36] = 7
    leaves = [tensor.detach().requires_grad_(differentiates) for tensor in tensors]
    linear_log_prob_sum(*leaves, targets, row_weight, forbidden=forbidden)  # which is checked when it is new
    with WaitWatch() as watch:
        total, _ = linear_log_prob_sum(*leaves, targets, row_weight, forbidden=forbidden)
        if differentiates:
            total.backward()
    assert watch.waits == ["tolist"]


@pytest.mark.parametrize("largest", [1.0, 0.75, -3.1e-9, 2.0**-126, 3e38, float("inf"), float("nan")])
def test_unit_of_float16_gradients(largest):
    """A power of two, 2^-8 to 2^-7 of the largest weight that counts; 1 where that is not finite."""
    row_weight, rows = torch.tensor([0.0, 1e39, largest]), torch.tensor([0, 2])
    unit = float(gradient_unit(row_weight, rows, torch.float16))
    wanted = 2.0 ** (math.frexp(largest)[1] - 8) if math.isfinite(largest) else 1.0
    assert unit == wanted
    assert gradient_unit(row_weight, rows[:0], torch.float16) == gradient_unit(row_weight, rows, torch.bfloat16) == 1.0
