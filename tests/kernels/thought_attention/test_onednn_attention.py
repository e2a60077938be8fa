"""Attention to the text keys by oneDNN's products: values, gradients, and what has no influence."""

from importlib import import_module

import pytest
import torch

from qstar_kernels import cpu_products, products, thought_attention, thought_attention_part
from qstar_kernels.testing import AttentionCase, assert_close, attention_inputs

onednn = import_module("qstar_kernels.thought_attention.torch.onednn")

pytestmark = [
    pytest.mark.skipif(products.find_refusal() is not None, reason="this PyTorch cannot call oneDNN"),
    pytest.mark.usefixtures("by_onednn"),
]
SHAPES = {
    "grouped": AttentionCase(positions=37, rationales=2, tokens=3),
    "one head": AttentionCase(batch=1, heads=1, kv_heads=1, positions=50, tokens=2),
    "multi-query": AttentionCase(heads=3, kv_heads=1, positions=29, tokens=4),
    "causal": AttentionCase(tokens=0, positions=61),
    "sinks": AttentionCase(positions=33, sinks=True),
    "one position": AttentionCase(positions=1),
}


@pytest.fixture(params=[100, 1000, 2**19])
def small(request, monkeypatch):
    """Any size is enough, and a block has about so many scores."""
    monkeypatch.setattr(onednn, "LEAST_SCORES", 0)
    monkeypatch.setattr(onednn, "SCORES", request.param)


def made(case, dtype, factor=1.0, *, strided=True):
    inputs = attention_inputs(case._replace(width=16, value_width=16), torch.float32, strided=strided)
    q, k, v = (x.detach() for x in inputs[:3])
    leaves = [(x * y).to(dtype).requires_grad_() for x, y in ((q, factor), (k, factor), (v, 1))]
    sinks = None if inputs.sinks is None else inputs.sinks.detach().to(dtype).requires_grad_()
    return leaves, dict(sinks=sinks, **inputs.rules)


def results(case, dtype, backend="auto", **changes):
    """out, lse and the gradients of all that learns."""
    leaves, options = made(case, dtype, **changes)
    out, lse = thought_attention(*leaves, **options, return_lse=True, backend=backend)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    learned = leaves if options["sinks"] is None else [*leaves, options["sinks"]]
    return [out, lse, *torch.autograd.grad(out, learned, do)]


@pytest.mark.parametrize("strided", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_and_gradients_are_those_of_the_reference(small, calls, shape, strided):
    ours = results(shape, torch.float32, strided=strided)
    assert calls
    exact = results(shape, torch.float64, "reference", strided=strided)
    for place, (x, right) in enumerate(zip(ours, exact, strict=True)):
        assert_close(x, right, gradient=place > 1, name=f"result {place}")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("factor", [3.0, 20.0])
def test_large_scores_lose_no_more_than_by_flash_attention(small, shape, factor):
    """Also where the lengths of queries and keys say nothing of the largest score."""
    exact, ours = (
        results(shape, dtype, backend, factor=factor)
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "auto"))
    )
    with cpu_products("torch"):
        by_flash = results(shape, torch.float32, factor=factor)
    for x, flash, right in zip(ours, by_flash, exact, strict=True):
        assert (x - right).norm() <= 1.5 * (flash - right).norm() + 2e-6 * right.norm()


def test_parts_are_those_of_the_packed_op(small, calls):
    case = AttentionCase(positions=40, rationales=2, tokens=3)
    leaves, _ = made(case, torch.float32)
    packed = thought_attention(*leaves, rationales=2)[:, :, 10:, 1:]
    q, k, v = (x[:, :, 10:, 1:].unflatten(3, (2, 3)) for x in leaves)
    calls.clear()
    part = thought_attention_part(q, *(x[:, :, :, 0] for x in leaves[1:]), k, v).flatten(3, 4)
    assert calls
    do = torch.randn(part.shape, generator=torch.Generator().manual_seed(1))
    assert_close(part, packed.double())
    for x, right in zip(torch.autograd.grad(part, leaves, do), torch.autograd.grad(packed, leaves, do), strict=True):
        assert_close(x, right.double(), gradient=True)


@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_later_positions_have_no_influence(small, factor):
    """Bit for bit, whatever stands there: neither keys and values of a thousand times the size, nor other queries."""
    case = AttentionCase(positions=30, rationales=2, tokens=2)
    leaves, options = made(case, torch.float32, factor)
    changed = [x.detach().clone() for x in leaves]
    for x in changed:
        x[:, :, 17:] = 1000 * torch.randn(x[:, :, 17:].shape, generator=torch.Generator().manual_seed(2))
    found = []
    for inputs in (leaves, [x.requires_grad_() for x in changed]):
        out, lse = thought_attention(*inputs, **options, return_lse=True)
        earlier = out[:, :, :17]
        (dq,) = torch.autograd.grad(earlier.square().sum(), inputs[0])
        found.append((earlier, lse[:, :, :17], dq[:, :, :17]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("positions", "width", "dtype", "taken"),
    [
        (420, 16, torch.float32, True),
        (380, 16, torch.float32, False),
        (420, 4, torch.float32, False),
        (420, 16, torch.float64, False),
    ],
)
def test_only_many_scores_of_float32_go_to_onednn(calls, positions, width, dtype, taken):
    thought_attention(*torch.zeros(3, 1, 2, positions, 25, width, dtype=dtype))
    assert bool(calls) == taken


def test_the_library_is_chosen_around_the_forward_for_the_backward_as_well(small, calls):
    with cpu_products("torch"):
        leaves, options = made(SHAPES["grouped"], torch.float32)
        out = thought_attention(*leaves, **options)
    torch.autograd.grad(out.sum(), leaves)
    assert not calls
    out = thought_attention(*leaves, **options)
    calls.clear()
    with cpu_products("torch"):
        torch.autograd.grad(out.sum(), leaves)
    assert calls
