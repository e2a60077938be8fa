import itertools
from importlib import import_module

import pytest
import torch
from torch.autograd import gradcheck

from qstar_kernels import thought_attention, thought_attention_part
from qstar_kernels.testing import AttentionCase, assert_close, attention_inputs

blocks = import_module("qstar_kernels.thought_attention.torch.blocks")

RULES = [
    {"window": window, "softcap": softcap, "sinks": sinks, "text_start": start}
    for window, softcap, sinks, start in itertools.product((None, 4), (None, 2.0), (False, True), (False, True))
]
CASE = AttentionCase(positions=6, rationales=2, tokens=3, value_width=4)
FLASH = CASE._replace(width=8, value_width=8, positions=40)


def part_inputs(case, inputs, start, stop):
    """What the thoughts at positions start .. stop - 1 are given, and the rules."""
    rules = {name: value for name, value in inputs.rules.items() if name != "rationales"}
    if rules["text_start"] is not None:
        rules["text_start"] = rules["text_start"][:, :stop]
    thoughts = [
        x[:, :, start:stop, 1:].unflatten(3, (case.rationales, case.tokens)) for x in (inputs.q, inputs.k, inputs.v)
    ]
    text = [x[:, :, :stop, 0] for x in (inputs.k, inputs.v)]
    return (thoughts[0], *text, *thoughts[1:]), {**rules, "sinks": inputs.sinks}


def in_parts(case, inputs, size, **options):
    """The packed op, its text first and then its thoughts in parts of ``size`` positions."""
    text = thought_attention(
        *(x[:, :, :, :1] for x in (inputs.q, inputs.k, inputs.v)),
        sinks=inputs.sinks,
        **{**inputs.rules, "rationales": 1},
        **options,
    )
    parts = []
    for start in range(0, case.positions, size):
        arguments, rules = part_inputs(case, inputs, start, min(start + size, case.positions))
        parts.append(thought_attention_part(*arguments, **rules, **options).flatten(3, 4))
    return torch.cat([text, torch.cat(parts, dim=2)], dim=3)


@pytest.fixture(params=["one block", "many blocks"])
def blocked(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(blocks, "SCORES_ON_CPU", 100)
        monkeypatch.setattr(blocks, "ROWS", 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("size", [1, 4, 6])
def test_parts_make_the_packed_op(rules, size, backend, blocked):
    """Its results and all its gradients, those of the text's keys from every part together."""
    case = CASE._replace(**rules)
    inputs = attention_inputs(case)
    packed = thought_attention(*inputs[:3], sinks=inputs.sinks, **inputs.rules, backend="reference")
    parts = in_parts(case, inputs, size, backend=backend)
    assert_close(parts, packed)
    do = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads, expected = (torch.autograd.grad(x, inputs.leaves, do) for x in (parts, packed))
    for grad, exact in zip(grads, expected, strict=True):
        assert_close(grad, exact, gradient=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("rationales", "size"), [(1, 40), (2, 7), (3, 16)])
def test_parts_by_flash_attention(dtype, sinks, rationales, size):
    case = FLASH._replace(sinks=sinks, rationales=rationales)
    inputs = attention_inputs(case, dtype)
    parts = in_parts(case, inputs, size)
    exact = attention_inputs(case)
    expected = thought_attention(*exact[:3], sinks=exact.sinks, **exact.rules, backend="reference")
    do = torch.randn(parts.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert_close(parts, expected)
    grads = torch.autograd.grad(parts, inputs.leaves, do.to(dtype))
    for grad, right in zip(grads, torch.autograd.grad(expected, exact.leaves, do.to(dtype).double()), strict=True):
        assert_close(grad, right, gradient=True)


@pytest.mark.parametrize("rules", [RULES[0], RULES[-1]], ids=["plain", "all rules"])
def test_triton_kernels_read_the_tokens_one_by_one(rules):
    pytest.importorskip("triton")
    case = AttentionCase(positions=5, rationales=2, tokens=3, width=16, value_width=16, **rules)
    inputs = attention_inputs(case, torch.float32)
    arguments, given = part_inputs(case, inputs, 2, 5)
    out = thought_attention_part(*arguments, **given, backend="triton")
    exact = [x.double() for x in arguments]
    given["sinks"] = None if given["sinks"] is None else given["sinks"].double()
    assert_close(out, thought_attention_part(*exact, **given, backend="reference"))


def test_gradients_are_those_of_finite_differences():
    case = CASE._replace(batch=1, positions=3, sinks=True)
    arguments, given = part_inputs(case, attention_inputs(case), 1, 3)
    leaves = [x.detach().requires_grad_() for x in arguments]
    assert gradcheck(lambda *x: thought_attention_part(*x[:5], sinks=x[5]), [*leaves, given["sinks"]])


def test_no_other_thought_has_influence():
    """Bit for bit: neither another rationale, nor a later token, nor another position."""
    inputs = attention_inputs(CASE, torch.float32)
    arguments, _ = part_inputs(CASE, inputs, 2, 6)
    q, k_text, v_text, k, v = (x.detach() for x in arguments)
    before = thought_attention_part(q, k_text, v_text, k, v)
    k, v = k.clone(), v.clone()
    k[:, :, 1, 0, 2:] = 50.0
    v[:, :, 1, 0, 2:] = -1e30
    after = thought_attention_part(q, k_text, v_text, k, v)
    assert (after[:, :, 1, 0, 2:] != before[:, :, 1, 0, 2:]).all()
    after[:, :, 1, 0, 2:] = before[:, :, 1, 0, 2:]
    assert torch.equal(after, before)


def test_thoughts_without_tokens_and_no_positions():
    for tokens, size in ((0, 3), (3, 0)):
        case = CASE._replace(tokens=tokens)
        arguments, _ = part_inputs(case, attention_inputs(case), 6 - size, 6)
        out = thought_attention_part(*arguments)
        assert out.shape == (*arguments[0].shape[:-1], case.value_width)
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), arguments[1:3]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(q=torch.zeros(2, 4, 3, 2, 16)), r"q has shape \[2, 4, 3, 2, 16\], but it must be \[B, Hq, Nq, r, T, D\]"),
        (dict(k_thought=torch.zeros(2, 2, 3, 2, 4, 8)), "k_thought has shape"),
        (dict(v_thought=torch.zeros(2, 2, 3, 1, 3, 8)), "v_thought has shape"),
        (dict.fromkeys(("k_text", "v_text"), torch.zeros(2, 2, 2, 8)), "q has 3 positions, but it must have at most"),
        (dict(k_text=torch.zeros(2, 2, 5, 8).double()), "k_text"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, message):
    given = dict(
        q=torch.zeros(2, 4, 3, 2, 3, 8),
        k_text=torch.zeros(2, 2, 5, 8),
        v_text=torch.zeros(2, 2, 5, 8),
        k_thought=torch.zeros(2, 2, 3, 2, 3, 8),
        v_thought=torch.zeros(2, 2, 3, 2, 3, 8),
    )
    with pytest.raises((ValueError, TypeError), match=message):
        thought_attention_part(**(given | changes))
