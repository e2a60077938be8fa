"""Attention of a thought's tokens to each other on a CPU: by batched products, by flash where they are many."""

from importlib import import_module

import pytest
import torch

from qstar_kernels import thought_attention, thought_attention_part
from qstar_kernels.testing import AttentionCase, assert_close, attention_inputs

own = import_module("qstar_kernels.thought_attention.torch.own")

CASES = {
    "grouped": AttentionCase(positions=11, rationales=2, tokens=5),
    "one head": AttentionCase(batch=1, heads=1, kv_heads=1, positions=7, tokens=6),
    "multi-query": AttentionCase(heads=3, kv_heads=1, positions=9, tokens=4),
    "one token": AttentionCase(positions=5, tokens=1),
    "sinks": AttentionCase(positions=8, tokens=3, sinks=True),
    "no thoughts": AttentionCase(positions=8, tokens=0),
}


@pytest.fixture
def called(monkeypatch):
    """How many blocks went by batched products."""
    made, blocks = [], own.blocks
    monkeypatch.setattr(own, "blocks", lambda *x: (made.append(each) or each for each in blocks(*x)))
    return made


def results(case, dtype, backend):
    """out, lse and the gradients of q, k and v."""
    inputs = attention_inputs(case._replace(width=16, value_width=16), torch.float32)
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    sinks = None if inputs.sinks is None else inputs.sinks.to(dtype)
    options = dict(sinks=sinks, return_lse=True, backend=backend, **inputs.rules)
    out, lse = thought_attention(*leaves, **options)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [out, lse, *torch.autograd.grad(out, leaves, do)]


@pytest.mark.parametrize("numbers", [1, 2000, 2**18])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocks_of_any_size_make_the_reference(case, numbers, called, monkeypatch):
    monkeypatch.setattr(own, "NUMBERS", numbers)
    ours = results(case, torch.float64, "torch")
    assert (len(called) > 0) == (case.tokens > 0)
    if numbers == 1 and case.tokens:
        assert len(called) == 2 * case.positions * case.rationales
    for x, right in zip(ours, results(case, torch.float64, "reference"), strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [own.MOST_TOKENS, own.MOST_TOKENS + 1])
def test_many_tokens_go_by_flash_attention(tokens, called):
    case = AttentionCase(positions=6, tokens=tokens)
    ours = results(case, torch.float64, "torch")
    assert bool(called) == (tokens == own.MOST_TOKENS)
    for x, right in zip(ours, results(case, torch.float64, "reference"), strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=1e-12)


def test_float32_is_as_exact_as_by_flash_attention(monkeypatch):
    case = AttentionCase(positions=40, rationales=2, tokens=9)
    ours = results(case, torch.float32, "torch")
    exact = results(case, torch.float64, "reference")
    for place, (x, right) in enumerate(zip(ours, exact, strict=True)):
        assert_close(x, right, gradient=place > 1, name=f"result {place}")
    monkeypatch.setattr(own, "MOST_TOKENS", 0)
    for x, by_flash, right in zip(ours, results(case, torch.float32, "torch"), exact, strict=True):
        assert (x - right).norm() <= 3 * (by_flash - right).norm()


def test_later_tokens_and_other_thoughts_have_no_influence():
    """Bit for bit, on outputs, and on the gradients of all that is read."""
    case = AttentionCase(positions=7, rationales=2, tokens=5, width=16, value_width=16)
    inputs = attention_inputs(case, torch.float32)
    hidden = slice(4, 6)  # the last two tokens of the first thought at every position

    def found(changed: bool) -> list[torch.Tensor]:
        leaves = [x.detach().clone() for x in inputs[:3]]
        if changed:
            for x in leaves[1:]:
                x[:, :, :, hidden] = 1e3
        leaves = [x.requires_grad_() for x in leaves]
        out = thought_attention(*leaves, rationales=2, backend="torch")
        seen = [out[..., :4, :], out[..., 6:, :]]
        grads = torch.autograd.grad(sum(x.square().sum() for x in seen), leaves)
        assert not any(grad[:, :, :, hidden].any() for grad in grads)
        return [*seen, *grads]

    results = found(False)
    assert all(x.any() for x in results)
    for x, same in zip(results, found(True), strict=True):
        assert torch.equal(x, same)


def test_parts_of_a_grid_go_the_same_way(called):
    """With their gradients: those of the thoughts are the packed op's, since no other position reads them."""
    case = AttentionCase(positions=9, rationales=2, tokens=4, width=16, value_width=16)
    leaves = [x.detach().requires_grad_() for x in attention_inputs(case, torch.float64)[:3]]
    whole = thought_attention(*leaves, rationales=2, backend="torch")[:, :, 3:, 1:].unflatten(3, (2, 4))
    do = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [x[:, :, 3:, 1:].unflatten(3, (2, 4)) for x in torch.autograd.grad(whole, leaves, do)]
    called.clear()
    q, *caches = (x.detach()[:, :, 3:, 1:].unflatten(3, (2, 4)).contiguous().requires_grad_() for x in leaves)
    texts = (x.detach()[:, :, :, 0] for x in leaves[1:])
    part = thought_attention_part(q, *texts, *caches, backend="torch")
    grads = torch.autograd.grad(part, [q, *caches], do)
    assert len(called) == 4  # two rationales, forward and backward
    for x, right in zip((part, *grads), (whole, *expected), strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=1e-12)
