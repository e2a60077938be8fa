"""What a step could be at most: attention is really left out, and the products are those of a step."""

from __future__ import annotations

import pytest
import torch

from bench_training_step import ATTENTION, make_model, our_step, texts
from lab import step_limit
from qstar_kernels import products, thought_attention


def test_attention_is_zeros_inside_and_itself_again_behind():
    q, k, v = (torch.randn(1, 2, 5, 4, 16, requires_grad=True) for _ in range(3))
    before = thought_attention(q, k, v, rationales=1)
    with step_limit.attention_for_free():
        out = thought_attention(q, k, v, rationales=1)
        grads = torch.autograd.grad(out, [q, k, v], torch.randn_like(out))
    assert not any(x.any() for x in (out, *grads))
    assert torch.equal(thought_attention(q, k, v, rationales=1), before) and before.any()


def test_a_step_without_attention_still_learns():
    model = make_model(ATTENTION["ours"])
    with step_limit.attention_for_free():
        our_step(model, texts(6))
    layer = model.model.layers[0]
    assert not layer.self_attn.q_proj.weight.grad.any() and layer.mlp.up_proj.weight.grad.any()


def test_products_are_as_large_as_the_pairs_of_rows_and_keys():
    length, layers, heads, group = 40, 4, 2, 2
    found = list(step_limit.bare_products(length))
    slots = 1 + 2 * (9 + 4 + 1)
    packed, step, text = (n * layers * heads for n in (7, 2 * 9, 2))
    rows = {calls: sum(r for each, _, r in found if each == calls) for calls in (packed, step, text)}
    assert rows == {packed: length * slots * group, step: length * 2 * group, text: length * group}
    assert all(0 < keys <= length for _, keys, _ in found)


@pytest.mark.skipif(products.find_refusal() is not None, reason="this PyTorch cannot call oneDNN")
def test_the_table_says_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step_limit", "8", "--rounds", "1"])
    monkeypatch.setattr(step_limit, "time_products", lambda length: 0.5)
    clock = iter([4.0, 2.0, 0.5])
    monkeypatch.setattr(step_limit, "seconds", lambda *step: next(clock))
    step_limit.main()
    assert capsys.readouterr().out.splitlines()[-1] == "| 8 | 4.00 | 2.00 (2.0x) | 1.00 (4.0x) | 0.50 (8.0x) |"


@pytest.mark.skipif(products.find_refusal() is not None, reason="this PyTorch cannot call oneDNN")
def test_every_product_is_timed_as_often_as_a_step_makes_it(monkeypatch):
    shapes = []
    monkeypatch.setattr(step_limit, "bare_products", lambda length: iter([(10, 6, 20), (4, 3, 8)]))
    monkeypatch.setattr(step_limit, "seconds", lambda call, a, b: shapes.append((*a.shape, *b.shape)) or 0.5)
    assert step_limit.time_products(9) == 10 * 0.5 + 4 * 0.5
    assert shapes == [(6, 64, 20, 64), (64, 6, 20, 6), (3, 64, 8, 64), (64, 3, 8, 3)]


def test_counts_below_one_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["step_limit", "8", "--rounds", "0"])
    with pytest.raises(SystemExit):
        step_limit.main()
    assert "--rounds: it is 0, but it must be at least 1" in capsys.readouterr().err
