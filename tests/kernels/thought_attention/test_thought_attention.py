import itertools
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from qstar_kernels import thought_attention
from qstar_kernels.testing import (
    AttentionCase,
    LargestTensor,
    assert_close,
    attention_inputs,
)

blocks = import_module("qstar_kernels.thought_attention.torch.blocks")
Rules = import_module("qstar_kernels.thought_attention.rules").Rules
flash = import_module("qstar_kernels.thought_attention.torch.flash")
operators = import_module("qstar_kernels.thought_attention.operators")

SHAPES = {
    "grouped": AttentionCase(),
    "one head": AttentionCase(heads=1, kv_heads=1, positions=11, tokens=2),
    "multi-query": AttentionCase(heads=3, kv_heads=1, rationales=3, tokens=1, width=8, value_width=8),
    "two rationales": AttentionCase(heads=6, positions=9, rationales=2, tokens=4),
    "wide values": AttentionCase(rationales=2, width=4, value_width=7),
    "narrow values": AttentionCase(width=6, value_width=1),
    "causal": AttentionCase(tokens=0, positions=13),
    "one position": AttentionCase(positions=1),
}
RULES = [
    {"window": window, "softcap": softcap, "sinks": sinks, "text_start": start}
    for window, softcap, sinks, start in itertools.product((None, 4), (None, 2.0), (False, True), (False, True))
]


def run(inputs, do=None, backend="torch"):
    """out, lse and the gradients of every leaf."""
    out, lse = thought_attention(*inputs[:3], sinks=inputs.sinks, **inputs.rules, return_lse=True, backend=backend)
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if do is None else do
    return out, lse, torch.autograd.grad(out, inputs.leaves, do.to(out.dtype).expand(out.shape))


def assert_same(inputs, exact=None, do=None):
    out, lse, grads = run(inputs, do)
    expected_out, expected_lse, expected_grads = run(exact or inputs, do, backend="reference")
    assert_close(out, expected_out, name="out")
    if lse.dtype == torch.float64 or inputs.q.dtype == torch.float32:
        assert_close(lse, expected_lse, name="lse")
    for name, grad, expected in zip(("dq", "dk", "dv", "dsinks"), grads, expected_grads, strict=False):
        assert_close(grad, expected, gradient=True, name=name)


@pytest.fixture(params=["one block", "many blocks"])
def block_size(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(blocks, "SCORES_ON_CPU", 300)
        monkeypatch.setattr(blocks, "ROWS", 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_torch_equals_reference(shape, rules, block_size):
    assert_same(attention_inputs(shape._replace(**rules)))


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), positions=st.integers(1, 12),
    rationales=st.integers(1, 3), tokens=st.integers(0, 5), width=st.integers(1, 9), value_width=st.integers(1, 9),
    window=st.none() | st.integers(2, 9), softcap=st.none() | st.floats(0.5, 5), sinks=st.booleans(),
    text_start=st.booleans(), strided=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_torch_equals_reference_in_any_shape(kv_heads, group, strided, seed, **shape):
    case = AttentionCase(heads=kv_heads * group, kv_heads=kv_heads, **shape)
    assert_same(attention_inputs(case, strided=strided, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rules", [RULES[0], RULES[-1]], ids=["plain", "all rules"])
def test_rounding_stays_within_the_rule(dtype, rules):
    case = AttentionCase(positions=61, rationales=2, tokens=5, width=32, value_width=32)._replace(**rules)
    inputs = attention_inputs(case, dtype)
    exact = inputs._replace(
        **{
            name: None if x is None else x.detach().double().requires_grad_()
            for name, x in zip(("q", "k", "v", "sinks"), inputs[:4], strict=True)
        }
    )
    do = torch.randn(1, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    assert run(inputs)[1].dtype == torch.float32
    assert_same(inputs, exact, do)


@pytest.mark.parametrize("rules", [{}, {"window": 3, "softcap": 1.5, "sinks": True, "text_start": True}], ids=str)
def test_gradients_are_those_of_finite_differences(rules):
    inputs = attention_inputs(AttentionCase(batch=1, positions=4, tokens=2, width=3, value_width=3)._replace(**rules))

    def op(q, k, v, sinks=None):
        return thought_attention(q, k, v, sinks=sinks, **inputs.rules)

    assert gradcheck(op, inputs.leaves)


@pytest.mark.parametrize("rules", [{}, {"softcap": 3.0}], ids=["flash", "blocks"])
def test_expanded_and_sliced_tensors(rules):
    case = AttentionCase(**rules)
    inputs = attention_inputs(case)
    assert_same(inputs, do=torch.ones((), dtype=torch.float64))
    every_other = [x.detach().repeat_interleave(2, dim=-1)[..., ::2].requires_grad_() for x in inputs[:3]]
    assert_same(inputs._replace(q=every_other[0], k=every_other[1], v=every_other[2]))
    shared = inputs.k[:, :, :1].detach().expand_as(inputs.k).requires_grad_()
    assert_same(inputs._replace(k=shared))


class GpuCalls(TorchDispatchMode):
    """The tensors that torch's flash attention for GPUs is given, by name."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "dot_product_flash" in func.name():
            names = (argument.name for argument in func._schema.arguments)
            self.given += [(name, x) for name, x in zip(names, args, strict=False) if isinstance(x, torch.Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [{}, {"batch": 1}, {"heads": 1, "kv_heads": 1}, {"tokens": 0}], ids=str)
@pytest.mark.parametrize("room", [0, 1])
def test_what_flash_attention_on_a_gpu_reads(case, room):
    """Its kernels take the log-sum-exp to be contiguous and read rows 16 bytes at a time, whatever the strides."""
    case = AttentionCase(width=16, value_width=16)._replace(**case)
    shape = (case.batch, case.heads, case.positions, case.slots, 16)

    def states(heads):
        x = torch.empty(case.batch, heads, *shape[2:4], 16 + room, dtype=torch.bfloat16, device="meta")
        return x[..., room:]

    q, do, dq, k, v, dk, dv = (states(heads) for heads in 3 * [case.heads] + 4 * [case.kv_heads])
    out, lse = torch.empty(shape, dtype=q.dtype, device="meta"), torch.empty(shape[:-1], device="meta")
    rules = Rules(0.25)
    with GpuCalls() as calls:
        flash.attend(q, k, v, 1, rules, out, lse)
        flash.attend_backward(do, out, lse, q, k, v, 1, rules, dq, dk, dv)
    assert {"query", "key", "value", "logsumexp"} <= {name for name, _ in calls.given}
    for name, x in calls.given:
        if name == "logsumexp":
            assert x.is_contiguous()
        elif name in ("query", "key", "value"):
            assert all(stride % 8 == 0 for stride in x.stride()[:-1]), (name, x.shape, x.stride())


def test_output_is_laid_out_as_the_input():
    inputs = attention_inputs(AttentionCase())
    out = thought_attention(*inputs[:3])
    assert out.permute(0, 2, 3, 1, 4).is_contiguous()
    assert thought_attention(*(x.contiguous() for x in inputs[:3])).is_contiguous()
    text = torch.zeros(1, 7, 2, 4).transpose(1, 2).unsqueeze(3)
    assert thought_attention(text, text, text).permute(0, 2, 3, 1, 4).is_contiguous()


@pytest.mark.parametrize("rules", [{}, {"window": 4, "softcap": 2.0, "text_start": True}], ids=["flash", "blocks"])
def test_other_thoughts_have_no_influence(rules):
    case = AttentionCase(positions=9, rationales=2, tokens=3, **rules)
    inputs = attention_inputs(case, torch.float32)
    before = run(inputs)
    changed = slice(4, 7)  # the second rationale at position 5
    k, v = inputs.k.detach().clone(), inputs.v.detach().clone()
    k[:, :, 5, changed] += 100
    v[:, :, 5, changed] -= 1e6
    after = run(inputs._replace(k=k.requires_grad_(), v=v.requires_grad_()))
    keep = torch.ones(case.positions, case.slots, dtype=torch.bool)
    keep[5, changed] = False
    for x, y in zip(before[:2], after[:2], strict=True):
        assert torch.equal(x[:, :, keep], y[:, :, keep])
        assert not torch.equal(x[:, :, ~keep], y[:, :, ~keep])
    assert torch.equal(before[2][0][:, :, keep], after[2][0][:, :, keep])


@pytest.mark.parametrize("rules", [{}, {"window": 3, "softcap": 2.0}], ids=["flash", "blocks"])
def test_later_text_has_no_influence(rules):
    inputs = attention_inputs(AttentionCase(positions=9, **rules), torch.float32)
    before = thought_attention(*inputs[:3], **inputs.rules)
    k, v = (x.detach().clone() for x in (inputs.k, inputs.v))
    k[:, :, 6:], v[:, :, 6:] = 50.0, -50.0
    after = thought_attention(inputs.q, k, v, **inputs.rules)
    assert torch.equal(before[:, :, :6], after[:, :, :6])
    assert not torch.equal(before[:, :, 6:], after[:, :, 6:])


def test_permuting_rationales_permutes_results():
    case = AttentionCase(rationales=3)
    inputs = attention_inputs(case)
    order = torch.tensor([2, 0, 1])
    slots = torch.cat([torch.zeros(1, dtype=torch.int64), (1 + 3 * order[:, None] + torch.arange(3)).flatten()])
    out = thought_attention(*inputs[:3], rationales=3)
    permuted = thought_attention(*(x[:, :, :, slots] for x in inputs[:3]), rationales=3)
    assert_close(permuted, out[:, :, :, slots])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_text_slots_are_causal_attention(backend):
    inputs = attention_inputs(AttentionCase(batch=1, positions=17))
    text = [x[:, :, :, 0] for x in inputs[:3]]
    expected = nn.functional.scaled_dot_product_attention(*text, is_causal=True, enable_gqa=True)
    out = thought_attention(*inputs[:3], backend=backend)
    assert_close(out[:, :, :, 0], expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(backend, sinks):
    case = AttentionCase(batch=1, positions=4, sinks=sinks)
    inputs = attention_inputs(case)
    inputs.rules["text_start"] = torch.tensor([[4, 4, 0, 0]], dtype=torch.int32)
    out, lse, grads = run(inputs, backend=backend)
    assert torch.equal(out[:, :, :2, 0], torch.zeros_like(out[:, :, :2, 0]))
    empty = inputs.sinks.detach()[None, :, None].expand(1, 4, 2) if sinks else torch.full((1, 4, 2), -torch.inf)
    assert torch.equal(lse[:, :, :2, 0].double(), empty.double())
    assert torch.equal(grads[0][:, :, :2, 0], torch.zeros_like(grads[0][:, :, :2, 0]))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert out[:, :, :2, 1:].abs().min() > 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("empty", [{"batch": 0}, {"positions": 0}], ids=str)
def test_empty_grids_have_empty_results(backend, empty):
    case = AttentionCase(sinks=True)._replace(**empty)
    out, lse, grads = run(attention_inputs(case), backend=backend)
    assert out.shape == (case.batch, 4, case.positions, 4, 5) and lse.shape == out.shape[:-1]
    assert torch.equal(grads[3], torch.zeros(4, dtype=torch.float64))


def test_memory_is_linear_in_positions(monkeypatch):
    monkeypatch.setattr(blocks, "SCORES_ON_CPU", 2**12)
    for rules in ({}, {"window": 90, "softcap": 2.0}):
        largest = []
        for positions in (64, 128, 256):
            case = AttentionCase(batch=1, positions=positions, rationales=2, **rules)
            inputs = attention_inputs(case)
            arguments = (*inputs[:3], None, None, case.rationales, 0.5, case.window, case.softcap, "torch")
            with LargestTensor() as seen, torch.no_grad():  # the functions: inside an operator no mode sees anything
                out, lse = operators.attend(*arguments)
                operators.attend_backward(torch.ones_like(out), out, lse, *arguments)
            largest.append(seen.largest)
            assert seen.largest < (positions * case.slots) ** 2
        assert largest[2] <= 2.1 * largest[1] <= 4.5 * largest[0]


def test_a_repeat_gives_the_same_bits():
    inputs = attention_inputs(AttentionCase(positions=33, width=16, value_width=16), torch.float32)
    first, second = run(inputs), run(inputs)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(x, y) for x, y in zip(first[2], second[2], strict=True))


@pytest.mark.parametrize("rules", [{}, {"softcap": 2.0}], ids=["flash", "blocks"])
def test_autocast_changes_nothing(rules):
    inputs = attention_inputs(AttentionCase(**rules), torch.float32)
    expected = run(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(inputs)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(x, y) for x, y in zip(actual[2], expected[2], strict=True))


def test_lse_and_second_derivatives_are_refused():
    inputs = attention_inputs(AttentionCase())
    out, lse = thought_attention(*inputs[:3], return_lse=True)
    assert not lse.requires_grad
    (dq,) = torch.autograd.grad(out.square().sum(), inputs.q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, r"q must be a tensor \[B, Hq, N, C, D\], but it is list"),
        ({"q": torch.zeros(2, 4, 7, 4)}, ValueError, r"q has shape \[2, 4, 7, 4\]"),
        ({"k": torch.zeros(2, 2, 7, 4, 6)}, ValueError, r"k has shape .* but it must be .*\[2, any, 7, 4, 5\]"),
        ({"v": torch.zeros(2, 1, 7, 4, 5)}, ValueError, r"v has shape"),
        ({"k": torch.zeros(2, 2, 7, 4, 5)}, TypeError, "k has dtype torch.float32, but it must be torch.float64"),
        ({"k": torch.zeros(2, 2, 7, 4, 5, device="meta", dtype=torch.float64)}, ValueError, "k is on meta"),
        ({"q": torch.zeros(2, 3, 7, 4, 5, dtype=torch.float64)}, ValueError, "q has 3 heads, .* multiple of the 2"),
        ({"q": torch.zeros(2, 4, 7, 4, 5, dtype=torch.int64)}, TypeError, "q has dtype torch.int64"),
        ({"rationales": 2}, ValueError, "q has 4 slots a position"),
        ({"rationales": 0}, ValueError, "rationales is 0"),
        ({"scale": "1"}, TypeError, "scale must be a number, but it is str"),
        ({"window": 0}, ValueError, "window is 0, but it must be at least 1"),
        ({"window": 2.0}, TypeError, "window must be an integer"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, but it must be above 0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks has shape \[2\]"),
        ({"text_start": torch.zeros(2, 6, dtype=torch.int64)}, ValueError, r"text_start has shape \[2, 6\]"),
        ({"text_start": torch.zeros(2, 7)}, TypeError, "text_start has dtype torch.float32"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', but it must be one of"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    inputs = attention_inputs(AttentionCase())
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, **changes}
    with pytest.raises(error, match=message):
        thought_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("rules", [RULES[0], RULES[-1]], ids=["plain", "every rule"])
def test_threads_change_nothing_that_counts_and_repeat_their_bits(rules):
    case = AttentionCase(batch=3, positions=40, rationales=2, tokens=5, width=16, value_width=16, **rules)
    inputs = attention_inputs(case, torch.float32)
    alone = run(inputs)
    torch.set_num_threads(4)
    first, again = run(inputs), run(inputs)
    for one, x, y in zip((*alone[:2], *alone[2]), (*first[:2], *first[2]), (*again[:2], *again[2]), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, one, rtol=1e-5, atol=1e-6)
