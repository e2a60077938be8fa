"""The interpolation between base and post-thought hidden states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from qstar_kernels import mix_hidden
from qstar_kernels.testing import assert_close

NAMES = ("base", "thought", "features", "head_weight")


def make_inputs(rows, base_rows, width, dtype=torch.float64, seed=0, indexed=True):
    torch.manual_seed(seed)
    shapes = ((base_rows if indexed else rows, width), (rows, width), (rows, width), (width,))
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    base_index = torch.randint(base_rows, (rows,)) if indexed else None
    return tensors, base_index


def run(tensors, base_index, sigmoid, backend, d_mixed, d_w):
    """Both results and the gradients of all four inputs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    mixed, w = mix_hidden(*tensors, base_index=base_index, sigmoid=sigmoid, backend=backend)
    gradients = torch.autograd.grad((mixed, w), tensors, (d_mixed.to(mixed.dtype), d_w.to(w.dtype)))
    return mixed, w, *gradients


@given(
    rows=st.integers(0, 13),
    base_rows=st.integers(1, 7),
    width=st.integers(1, 9),
    indexed=st.booleans(),
    sigmoid=st.booleans(),
)
@settings(deadline=None, derandomize=True, max_examples=30)
def test_results_and_gradients_are_the_references(rows, base_rows, width, indexed, sigmoid):
    tensors, base_index = make_inputs(rows, base_rows, width, indexed=indexed)
    upstream = torch.randn(rows, width, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    ours = run(tensors, base_index, sigmoid, "torch", *upstream)
    wanted = run(tensors, base_index, sigmoid, "reference", *upstream)
    for mine, reference in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_lower_precisions_stay_within_the_rule(dtype, sigmoid):
    tensors, base_index = make_inputs(111, 37, 63, dtype)
    upstream = torch.randn(111, 63, dtype=torch.float64).to(dtype), torch.randn(111, dtype=torch.float32)
    ours = run(tensors, base_index, sigmoid, "torch", *upstream)
    exact = run([tensor.double() for tensor in tensors], base_index, sigmoid, "reference", *upstream)
    for index, (mine, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert_close(mine, wanted, gradient=index >= 2)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradients_are_those_of_finite_differences(sigmoid):
    tensors, base_index = make_inputs(5, 3, 4)
    assert torch.autograd.gradcheck(lambda *x: mix_hidden(*x, base_index=base_index, sigmoid=sigmoid), tensors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("indexed", [False, True])
def test_weight_zero_gives_the_base_bit_for_bit(dtype, indexed):
    (base, thought, features, head_weight), base_index = make_inputs(50, 9, 17, dtype, indexed=indexed)
    with torch.no_grad():
        base[0, :8] = -0.0
        thought[0, 0] = torch.inf
        head_weight.zero_()
    mixed, w = mix_hidden(base, thought, features, head_weight, base_index=base_index)
    u = base if base_index is None else base[base_index]
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(mixed.view(bits), u.view(bits))
    assert not w.any()


def test_a_head_that_starts_at_zero_learns():
    (base, thought, features, head_weight), base_index = make_inputs(50, 9, 17)
    head_weight = torch.zeros_like(head_weight).requires_grad_()
    d_mixed = torch.randn(50, 17, dtype=torch.float64)
    mixed, _ = mix_hidden(base, thought, features, head_weight, base_index=base_index)
    (d_head,) = torch.autograd.grad(mixed, head_weight, d_mixed)
    wanted = (d_mixed * (thought - base[base_index])).sum(-1) @ features
    torch.testing.assert_close(d_head, wanted, rtol=1e-12, atol=1e-12)


def test_gradient_through_one_result_only():
    tensors, base_index = make_inputs(11, 5, 6)
    zeros, ones = torch.zeros(11, 6, dtype=torch.float64), torch.ones(11, dtype=torch.float64)
    mixed, w = mix_hidden(*tensors, base_index=base_index)
    through_w = torch.autograd.grad(w.sum(), tensors, allow_unused=True, retain_graph=True)
    wanted = run(tensors, base_index, False, "reference", zeros, ones)[2:]
    for mine, reference in zip(through_w, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(reference) if mine is None else mine, reference)
    through_mixed = torch.autograd.grad(mixed.sum(), tensors)
    wanted = run(tensors, base_index, False, "reference", zeros + 1, ones * 0)[2:]
    for mine, reference in zip(through_mixed, wanted, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)


def test_inputs_may_have_any_strides():
    tensors, _ = make_inputs(12, 12, 10)
    strided = [torch.stack([tensor.detach(), tensor.detach() * 7], -1)[..., 0] for tensor in tensors]
    base_index = torch.arange(24)[::2].flip(0) % 12
    upstream = torch.ones(1, 1, dtype=torch.float64).expand(12, 10), torch.ones(1, dtype=torch.float64).expand(12)
    assert not any(tensor.is_contiguous() for tensor in strided)
    for mine, reference in zip(
        run(strided, base_index, False, "torch", *upstream),
        run(tensors, base_index, False, "reference", *upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)


def test_shared_base_rows_add_up_in_a_fixed_order():
    tensors, base_index = make_inputs(5000, 3, 32, torch.float32)
    upstream = torch.randn(5000, 32), torch.zeros(5000)
    first = run(tensors, base_index, False, "torch", *upstream)[2]
    assert all(torch.equal(run(tensors, base_index, False, "torch", *upstream)[2], first) for _ in range(5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant):
    tensors, base_index = make_inputs(20, 6, 8)

    def total(*tensors):
        mixed, w = mix_hidden(*tensors, base_index=base_index)
        return mixed.square().sum() + w.sum()

    wanted = torch.autograd.grad(total(*tensors), tensors)
    checkpoint(total, *tensors, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(tensors, wanted, strict=True))


def test_autocast_has_no_effect():
    tensors, base_index = make_inputs(20, 6, 8, torch.float32)
    upstream = torch.randn(20, 8), torch.randn(20)
    wanted = run(tensors, base_index, True, "torch", *upstream)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(tensors, base_index, True, "torch", *upstream)
    assert all(torch.equal(mine, plain) for mine, plain in zip(ours, wanted, strict=True))


def test_a_head_of_another_precision():
    (base, thought, features, head_weight), base_index = make_inputs(20, 6, 8, torch.bfloat16)
    head_weight = head_weight.detach().float().requires_grad_()
    mixed, w = mix_hidden(base, thought, features, head_weight, base_index=base_index)
    (mixed.float().sum() + w.sum()).backward()
    assert (mixed.dtype, w.dtype) == (torch.bfloat16, torch.float32)
    assert (base.grad.dtype, features.grad.dtype, head_weight.grad.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    torch.testing.assert_close(w, features.float() @ head_weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"thought": torch.zeros(4)}, ValueError, r"thought has shape \[4\]"),
        ({"base": torch.zeros(3, 5)}, ValueError, r"base has shape \[3, 5\], but it must be \[Rb, E\]"),
        ({"base": torch.zeros(3, 6, dtype=torch.float64)}, TypeError, "base has dtype torch.float64.*like thought"),
        ({"features": torch.zeros(4, 5)}, ValueError, r"features has shape \[4, 5\]"),
        ({"features": torch.zeros(4, 6, dtype=torch.float64)}, TypeError, "features has dtype torch.float64"),
        ({"head_weight": torch.zeros(1, 6)}, ValueError, r"head_weight has shape \[1, 6\]"),
        ({"head_weight": [0.0]}, TypeError, "head_weight must be a tensor"),
        ({"base_index": torch.zeros(4, dtype=torch.int32)}, TypeError, "base_index has dtype torch.int32"),
        ({"base_index": torch.tensor([0, 1, 3, 2])}, ValueError, r"base_index holds 3, but .* in \[0, 3\)"),
        ({"base_index": torch.tensor([0, -1, 0, 0])}, ValueError, r"base_index holds -1, but .* in \[0, 3\)"),
        ({"base_index": None}, ValueError, r"base has shape \[3, 6\], but it must be \[R, E\] = \[4, 6\]"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {name: torch.zeros(4, 6) for name in NAMES} | {"base": torch.zeros(3, 6), "head_weight": torch.zeros(6)}
    arguments |= {"base_index": torch.tensor([0, 1, 2, 2])}
    with pytest.raises(error, match=message):
        mix_hidden(**arguments | change)
