import itertools
from importlib import import_module

import pytest
import torch
from torch.autograd import gradcheck

from qstar_kernels import thought_attention, thought_attention_step
from qstar_kernels.testing import AttentionCase, assert_close, attention_inputs, relative_error

blocks = import_module("qstar_kernels.thought_attention.torch.blocks")
direct = import_module("qstar_kernels.thought_attention.torch.direct")
flash = import_module("qstar_kernels.thought_attention.torch.flash")

RULES = [
    {"window": window, "softcap": softcap, "sinks": sinks, "text_start": start}
    for window, softcap, sinks, start in itertools.product((None, 4), (None, 2.0), (False, True), (False, True))
]
CASE = AttentionCase(positions=6, rationales=2, tokens=3, value_width=4)


def step_inputs(case, inputs, queries, step, filler=float("nan")):
    """q and the caches of token ``step`` at the last ``queries`` positions, ``filler`` beyond it."""
    first = case.positions - queries
    slot = 1 + step + case.tokens * torch.arange(case.rationales)
    q = inputs.q[:, :, first:, slot]
    k_text, v_text = inputs.k[:, :, :, 0], inputs.v[:, :, :, 0]
    k_thought, v_thought = (
        x[:, :, first:, 1:].unflatten(3, (case.rationales, case.tokens)).clone() for x in (inputs.k, inputs.v)
    )
    k_thought[..., step + 1 :, :] = filler
    v_thought[..., step + 1 :, :] = filler
    rules = {name: value for name, value in inputs.rules.items() if name != "rationales"}
    return (q, k_text, v_text, k_thought, v_thought, step), {**rules, "sinks": inputs.sinks}, (first, slot)


@pytest.fixture(params=["direct", "one block", "many blocks"])
def path(request, monkeypatch):
    """Of what flash attention does not serve."""
    if request.param != "direct":
        monkeypatch.setattr(direct, "serves", lambda *_: False)
    if request.param == "many blocks":
        monkeypatch.setattr(blocks, "SCORES_ON_CPU", 100)
        monkeypatch.setattr(blocks, "ROWS", 1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_is_one_slot_of_the_packed_op(rules, backend, path):
    case = CASE._replace(**rules)
    inputs = attention_inputs(case)
    packed = thought_attention(*inputs[:3], sinks=inputs.sinks, **inputs.rules, return_lse=True, backend="reference")
    for queries, step in itertools.product((1, 4, 6), range(3)):
        arguments, rules, (first, slot) = step_inputs(case, inputs, queries, step)
        out, lse = thought_attention_step(*arguments, **rules, return_lse=True, backend=backend)
        assert_close(out, packed[0][:, :, first:, slot])
        assert_close(lse, packed[1][:, :, first:, slot])


@pytest.mark.parametrize("rules", [RULES[0], RULES[-1]], ids=["plain", "all rules"])
def test_gradients_equal_reference(rules, path):
    case = CASE._replace(**rules)
    inputs = attention_inputs(case)
    arguments, rules, _ = step_inputs(case, inputs, 4, 1)
    out = thought_attention_step(*arguments, **rules)
    expected = thought_attention_step(*arguments, **rules, backend="reference")
    do = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads, expected_grads = (torch.autograd.grad(x, inputs.leaves, do, retain_graph=True) for x in (out, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad, gradient=True)


def test_gradients_are_those_of_finite_differences():
    case = CASE._replace(batch=1, positions=3, sinks=True)
    inputs = attention_inputs(case)
    arguments, _, _ = step_inputs(case, inputs, 2, 1, filler=0.0)
    leaves = [x.detach().requires_grad_() for x in arguments[:5]]
    assert gradcheck(lambda *x: thought_attention_step(*x[:5], 1, sinks=x[5]), [*leaves, inputs.sinks])


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_slots_beyond_the_step_have_no_influence(backend, path):
    inputs = attention_inputs(CASE, torch.float32)
    results = []
    for filler in (0.0, float("nan"), float("inf")):
        arguments, rules, _ = step_inputs(CASE, inputs, 5, 1, filler)
        out = thought_attention_step(*arguments, **rules, backend=backend)
        results.append((out, *torch.autograd.grad(out.sum(), inputs.leaves)))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_stays_within_the_rule(dtype, path):
    case = AttentionCase(positions=61, rationales=2, tokens=5, width=32, value_width=32)
    inputs = attention_inputs(case, dtype)
    arguments, rules, _ = step_inputs(case, inputs, 50, 3, 0.0)
    exact = [x.double() for x in arguments[:5]]
    out = thought_attention_step(*arguments, **rules)
    assert out.dtype == dtype
    assert_close(out, thought_attention_step(*exact, 3, **rules, backend="reference"))


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("queries", [1, 4])
def test_hidden_text_has_no_influence(rules, queries, path):
    """Bit for bit, whatever is in its keys and values."""
    case = CASE._replace(**rules)
    inputs = attention_inputs(case, torch.float32)
    (q, k_text, v_text, *rest), rules, (first, _) = step_inputs(case, inputs, queries, 1)
    key, query = torch.arange(case.positions), torch.arange(first, case.positions)[:, None]
    visible = (key <= query).expand(case.batch, -1, -1)
    if case.window is not None:
        visible = visible & (query + 2 - key < case.window)
    if case.text_start:
        visible = visible & (key >= rules["text_start"][:, first:, None])
    out, lse = thought_attention_step(q, k_text, v_text, *rest, **rules, return_lse=True)
    for index in range(queries):
        hidden = ~visible[:, index, None, :, None]
        others = (x.masked_fill(hidden, filler) for x, filler in ((k_text, 50.0), (v_text, -1e30)))
        other, other_lse = thought_attention_step(q, *others, *rest, **rules, return_lse=True)
        assert torch.equal(other[:, :, index], out[:, :, index])
        assert torch.equal(other_lse[:, :, index], lse[:, :, index])


@pytest.mark.parametrize("window", [1, 2, 5, 11, 40])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_of_any_length(window, sinks, path):
    """From one that hides all text and older tokens of the thought to one that hides nothing."""
    case = AttentionCase(positions=9, tokens=4, value_width=8, window=window, sinks=sinks)
    inputs = attention_inputs(case, strided=sinks)
    for queries, step in itertools.product((1, 2, 8), (0, 3)):
        arguments, rules, _ = step_inputs(case, inputs, queries, step, 0.0)
        out, lse = thought_attention_step(*arguments, **rules, return_lse=True)
        wanted, wanted_lse = thought_attention_step(*arguments, **rules, return_lse=True, backend="reference")
        assert_close(out, wanted)
        assert_close(lse, wanted_lse)


@pytest.mark.parametrize("strided", [False, True], ids=["slots inside heads", "heads inside slots"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("batch", "rationales"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_any_layout_and_group_of_heads(batch, rationales, kv_heads, strided, path):
    case = AttentionCase(batch=batch, rationales=rationales, kv_heads=kv_heads, softcap=3.0)
    inputs = attention_inputs(case, strided=strided)
    for queries, step in itertools.product((1, 2, 7), (0, 2)):
        arguments, rules, _ = step_inputs(case, inputs, queries, step, 0.0)
        out, lse = thought_attention_step(*arguments, **rules, return_lse=True)
        wanted, wanted_lse = thought_attention_step(*arguments, **rules, return_lse=True, backend="reference")
        assert_close(out, wanted)
        assert_close(lse, wanted_lse)


@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_log_sum_exp_of_flat_and_of_steep_scores(size, path):
    inputs = attention_inputs(CASE, torch.float32)
    (q, *arguments), rules, _ = step_inputs(CASE, inputs, 4, 1, 0.0)
    _, lse = thought_attention_step(q * size, *arguments, **rules, return_lse=True)
    exact = [x.double() for x in (q * size, *arguments[:4])]
    _, wanted = thought_attention_step(*exact, 1, **rules, return_lse=True, backend="reference")
    assert_close(lse, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_rounding_with_flash_attention_as_on_a_gpu(monkeypatch, dtype, sinks):
    """Which rounds the text's part; what joins it must not add to that. On a CPU 16 bits go by blocks."""
    monkeypatch.setattr(flash, "expressible", lambda q, v, rules: True)
    case = AttentionCase(positions=61, rationales=2, tokens=5, width=32, value_width=32, sinks=sinks)
    inputs = attention_inputs(case, dtype)
    arguments, rules, _ = step_inputs(case, inputs, 61, 3, 0.0)
    exact = [x.double() for x in arguments[:5]]
    out, lse = thought_attention_step(*arguments, **rules, return_lse=True)
    expected, expected_lse = thought_attention_step(*exact, 3, **rules, return_lse=True, backend="reference")
    assert_close(out, expected)
    assert relative_error(lse, expected_lse) < 1e-5


def test_step_may_be_a_tensor():
    inputs = attention_inputs(CASE)
    arguments, rules, _ = step_inputs(CASE, inputs, 6, 1)
    expected = thought_attention_step(*arguments, **rules)
    for dtype in (torch.int32, torch.int64):
        step = torch.tensor(1, dtype=dtype)
        assert torch.equal(thought_attention_step(*arguments[:5], step, **rules), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("empty", ["batch", "queries"])
def test_empty_steps_have_empty_results(empty, backend):
    case = CASE._replace(batch=0) if empty == "batch" else CASE
    inputs = attention_inputs(case)
    arguments, rules, _ = step_inputs(case, inputs, 0 if empty == "queries" else 6, 0)
    out = thought_attention_step(*arguments, **rules, backend=backend)
    assert out.shape == (*arguments[0].shape[:-1], 4)
    grads = torch.autograd.grad(out.sum(), inputs.leaves)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in grads)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"step": 3}, ValueError, "step is 3, but it must be below the 3 tokens"),
        ({"step": -1}, ValueError, "step is -1"),
        ({"step": 1.0}, TypeError, "step must be an integer"),
        ({"step": torch.tensor([1])}, ValueError, r"step has shape \[1\]"),
        ({"step": torch.tensor(1.0)}, TypeError, "step has dtype torch.float32"),
        ({"q": torch.zeros(2, 4, 7, 2, 5, dtype=torch.float64)}, ValueError, "k_thought has shape"),
        ({"k_text": torch.zeros(2, 2, 5, 5, dtype=torch.float64)}, ValueError, "v_text has shape"),
        ({"v_thought": torch.zeros(2, 2, 6, 2, 3, 4)}, TypeError, "v_thought has dtype torch.float32"),
        ({"text_start": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, "text_start has shape"),
        ({"backend": "dense"}, ValueError, "backend is 'dense'"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    names = ("q", "k_text", "v_text", "k_thought", "v_thought", "step")
    arguments, _, _ = step_inputs(CASE, attention_inputs(CASE), 6, 1, 0.0)
    with pytest.raises(error, match=message):
        thought_attention_step(**{**dict(zip(names, arguments, strict=True)), **changes})


def test_more_queries_than_text_are_refused():
    arguments, _, _ = step_inputs(CASE, attention_inputs(CASE), 6, 1, 0.0)
    q, k_text, v_text, *rest = arguments
    with pytest.raises(ValueError, match="q has 6 positions, but it must have at most the 4 of k_text"):
        thought_attention_step(q, k_text[:, :, :4], v_text[:, :, :4], *rest)
