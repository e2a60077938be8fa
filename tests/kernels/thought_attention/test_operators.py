"""Thought attention as operators of torch: opcheck, the compiler, the FLOP counter, and what a backend is given."""

import shutil
from importlib import import_module
from types import SimpleNamespace

import fresh_python
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from qstar_kernels import backends, thought_attention, thought_attention_part, thought_attention_step
from qstar_kernels.testing import AttentionCase, attention_inputs

by_torch = import_module("qstar_kernels.thought_attention.torch")
operators = import_module("qstar_kernels.thought_attention.operators")
ops = torch.ops.qstar_kernels

EVERY_RULE = {"window": 4, "softcap": 2.0, "sinks": True, "text_start": True}
CASES = {
    "plain": AttentionCase(),
    "every rule": AttentionCase(**EVERY_RULE),
    "two rationales": AttentionCase(positions=5, rationales=2, tokens=2, value_width=3),
    "causal": AttentionCase(tokens=0, sinks=True),
    "no position": AttentionCase(positions=0),
}
either = pytest.mark.parametrize("rules", [{}, EVERY_RULE], ids=["plain", "every rule"])


def detached(arguments):
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


def grid_arguments(case: AttentionCase, strided: bool = True) -> tuple:
    inputs = attention_inputs(case, strided=strided)
    start = inputs.rules["text_start"]
    return (*inputs[:3], inputs.sinks, start, case.rationales, 0.4, case.window, case.softcap, "torch")


def step_leaves(case: AttentionCase, queries: int) -> list[Tensor]:
    """q, the text and the thoughts of a step, each a leaf."""
    inputs = attention_inputs(case)
    q = inputs.q[:, :, case.positions - queries :, 1 :: case.tokens]
    texts = [x[:, :, :, 0] for x in (inputs.k, inputs.v)]
    thoughts = [x[:, :, -queries:, 1:].unflatten(3, (case.rationales, case.tokens)) for x in (inputs.k, inputs.v)]
    return [x.detach().requires_grad_() for x in (q, *texts, *thoughts)]


def step_rules(case: AttentionCase) -> dict:
    inputs = attention_inputs(case)
    rules = {name: value for name, value in inputs.rules.items() if name != "rationales"}
    return {**rules, "sinks": inputs.sinks}


def some_positions(case: AttentionCase, queries: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, case.positions, (case.batch, queries), generator=generator)


def step_arguments(
    case: AttentionCase, step: int | None, step_index: Tensor | None, positions: Tensor | None = None
) -> tuple:
    rules = step_rules(case)
    leaves = step_leaves(case, min(4, case.positions))
    given = step, step_index, rules["sinks"], rules["text_start"], positions
    return (*leaves, *given, 0.4, case.window, case.softcap, "torch")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_opcheck_of_the_packed_op(case):
    arguments = grid_arguments(case, strided=case is not CASES["plain"])
    opcheck(ops.thought_attention.default, arguments)
    arguments = detached(arguments)
    out, lse = ops.thought_attention(*arguments)
    do = torch.ones((), dtype=out.dtype).expand(out.shape)
    opcheck(ops.thought_attention_backward.default, (do, out, lse, *arguments))


@pytest.mark.parametrize("at", ["the last positions", "some positions"])
@pytest.mark.parametrize(
    ("name", "step", "step_index"),
    [("plain", 1, None), ("every rule", 0, None), ("two rationales", None, torch.tensor(1)), ("no position", 1, None)],
)
def test_opcheck_of_the_step(name, step, step_index, at):
    case = CASES[name]
    given = at == "some positions" and case.positions
    arguments = step_arguments(case, step, step_index, some_positions(case, min(4, case.positions)) if given else None)
    opcheck(ops.thought_attention_step.default, arguments)
    arguments = detached(arguments)
    out, lse = ops.thought_attention_step(*arguments)
    opcheck(ops.thought_attention_step_backward.default, (torch.ones_like(out), out, lse, *arguments[:-1]))


def part_leaves(case: AttentionCase, queries: int) -> list[Tensor]:
    """q [B, Hq, Nq, r, T, D] and keys and values of the text and of the thoughts at the last ``queries`` positions."""
    inputs = attention_inputs(case)
    first = case.positions - queries
    own = [x[:, :, first:, 1:].unflatten(3, (case.rationales, case.tokens)) for x in (inputs.q, inputs.k, inputs.v)]
    leaves = (own[0], inputs.k[:, :, :, 0], inputs.v[:, :, :, 0], *own[1:])
    return [x.detach().clone().requires_grad_() for x in leaves]


@pytest.mark.parametrize("at", ["the last positions", "some positions"])
@pytest.mark.parametrize("name", ["plain", "every rule", "two rationales", "no position"])
def test_opcheck_of_a_part(name, at):
    case = CASES[name]
    given = at == "some positions" and case.positions
    positions = some_positions(case, min(4, case.positions)) if given else None
    q, *others = part_leaves(case, min(4, case.positions))
    rules = step_rules(case)
    arguments = (q.detach().flatten(3, 4).requires_grad_(), *others, rules["sinks"], rules["text_start"], positions)
    arguments += (0.4, case.window, case.softcap, "torch")
    opcheck(ops.thought_attention_part.default, arguments)
    arguments = detached(arguments)
    out, lse = ops.thought_attention_part(*arguments)
    opcheck(ops.thought_attention_part_backward.default, (torch.ones_like(out), out, lse, *arguments[:-1]))


def assert_compiles(function, leaves, *others, compiler="aot_eager"):
    """In one graph, with the results, their layout and the gradients of the uncompiled function."""
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for x in others or (None,):
        arguments = leaves if x is None else (*leaves, x)
        (out, lse), (expected_out, expected_lse) = compiled(*arguments), function(*arguments)
        torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
        assert out.stride() == expected_out.stride() and not lse.requires_grad
        grads, expected_grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected_out))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@either
def test_the_packed_op_compiles_in_one_graph(rules, fresh_compiler):
    inputs = attention_inputs(AttentionCase(**rules))

    def function(q, k, v, sinks=None):
        return thought_attention(q * 2, k, v, sinks=sinks, **inputs.rules, return_lse=True)

    assert_compiles(function, inputs.leaves)


@either
def test_the_step_compiles_in_one_graph(rules, fresh_compiler):
    case = AttentionCase(rationales=2, **rules)
    rules = step_rules(case)

    def function(*arguments):
        return thought_attention_step(*arguments, **rules, return_lse=True)

    assert_compiles(function, step_leaves(case, 5), 0, 1, 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_layout(fresh_compiler):
    inputs = attention_inputs(AttentionCase(tokens=0, sinks=True))

    def function(q, k, v, sinks):
        return thought_attention(q * 2, k + 1, v, sinks=sinks, return_lse=True)

    assert_compiles(function, inputs.leaves, compiler="inductor")


@pytest.mark.parametrize("step", [0, 1, 2])
def test_gradients_beyond_the_step_are_zero(step):
    leaves = step_leaves(AttentionCase(rationales=2), 5)
    *_, dk_thought, dv_thought = torch.autograd.grad(thought_attention_step(*leaves, step).sum(), leaves)
    for grad in (dk_thought, dv_thought):
        assert torch.equal(grad[..., step + 1 :, :], torch.zeros_like(grad[..., step + 1 :, :]))
        assert grad[..., : step + 1, :].abs().min() > 0


def test_second_derivatives_of_the_step_are_refused():
    leaves = step_leaves(AttentionCase(), 5)
    out = thought_attention_step(*leaves, 1)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def count_flops(function, leaves) -> tuple[int, int]:
    """Of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        out = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_flops_of_the_packed_op_are_those_that_count():
    case = AttentionCase(1, 2, 1, positions=3, rationales=2, tokens=2, width=4, value_width=3)
    inputs = attention_inputs(case)
    pairs = 2 * (5 * (1 + 2 + 3) + 3 * 2 * (1 + 2))  # heads, (slots and keys of text, thoughts and their keys)
    assert pairs == case.pairs == 96
    flops = count_flops(lambda *x: thought_attention(*x, rationales=2, window=2), inputs.leaves)
    assert flops == (96 * 2 * (4 + 3), 96 * 2 * (3 * 4 + 2 * 3)) == (1344, 3456)


def test_flops_of_the_step_are_those_that_count():
    case = AttentionCase(1, 2, 1, positions=3, rationales=2, tokens=3, width=4, value_width=3)
    leaves = step_leaves(case, 2)
    pairs = 2 * 2 * ((2 + 3) + 2 * 2)  # heads, rationales, (text of the last two positions, tokens 0 and 1)
    assert count_flops(lambda *x: thought_attention_step(*x, 1), leaves) == (pairs * 14, pairs * 36) == (504, 1296)
    arguments = step_arguments(case._replace(positions=4), None, torch.tensor(0))
    all_tokens = 2 * 2 * ((1 + 2 + 3 + 4) + 4 * 3)
    assert count_flops(lambda *_: ops.thought_attention_step(*arguments)[0], ()) == (all_tokens * 14, all_tokens * 36)


def test_flops_of_a_part_are_those_that_count():
    case = AttentionCase(1, 2, 1, positions=3, rationales=2, tokens=3, width=4, value_width=3)
    leaves = part_leaves(case, 2)
    pairs = 2 * 2 * (3 * (2 + 3) + 2 * (1 + 2 + 3))  # heads, rationales, (tokens and the text, positions and own keys)
    assert count_flops(thought_attention_part, leaves) == (pairs * 14, pairs * 36) == (1512, 3888)


def test_flops_at_some_positions_are_those_of_positions_spread_evenly():
    case = AttentionCase(1, 2, 1, positions=3, rationales=2, tokens=3, width=4, value_width=3)
    first_and_last = dict(positions=torch.tensor([[0, 2]]))
    pairs = 2 * 2 * (3 * (1 + 3) + 2 * (1 + 2 + 3))  # heads, rationales, (tokens and the text, positions and own keys)
    part = count_flops(lambda *x: thought_attention_part(*x, **first_and_last), part_leaves(case, 2))
    assert part == (pairs * 14, pairs * 36)
    pairs = 2 * 2 * ((1 + 3) + 2 * 2)
    step = count_flops(lambda *x: thought_attention_step(*x, 1, **first_and_last), step_leaves(case, 2))
    assert step == (pairs * 14, pairs * 36)


def test_the_import_is_light():
    code = 'import sys, qstar_kernels; print("torch._dynamo" in sys.modules)'
    assert fresh_python.run(code) == "False"


def test_an_operator_has_two_backends():
    with pytest.raises(ValueError, match=r"^backend is 'dense', but an operator's must be 'torch' or 'triton'$"):
        ops.thought_attention(*grid_arguments(AttentionCase())[:-1], "dense")


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """The calls of the functions that launch kernels, which the torch backend's stand for here."""
    calls = []

    def recorded(name):
        def function(*arguments):
            calls.append((name, *arguments))
            getattr(by_torch, name)(*arguments)

        return function

    names = ("attend", "attend_backward", "attend_step")
    packages = {"torch": by_torch, "triton": SimpleNamespace(**{name: recorded(name) for name in names})}
    monkeypatch.setattr(operators, "implementation", lambda folder, backend: packages[backend])
    monkeypatch.setattr(backends, "load", lambda folder, backend: packages[backend])
    monkeypatch.setattr(backends, "find_refusal", lambda op, given: None)
    return calls


def test_triton_runs_forward_and_backward(calls):
    inputs = attention_inputs(AttentionCase(**EVERY_RULE))
    results = []
    for backend in ("triton", "torch"):
        out = thought_attention(*inputs[:3], sinks=inputs.sinks, **inputs.rules, backend=backend)
        results.append([out, *torch.autograd.grad(out.sum(), inputs.leaves)])
    assert [name for name, *_ in calls] == ["attend", "attend_backward"]
    assert all(x.stride(-1) == 1 for _, *arguments in calls for x in arguments if isinstance(x, Tensor) and x.dim() > 4)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_triton_reads_the_step_on_the_device(calls, compiled, fresh_compiler):
    case = AttentionCase(rationales=2, **EVERY_RULE)
    leaves, rules = step_leaves(case, 5), step_rules(case)

    def function(*arguments):
        return thought_attention_step(*arguments, **rules, backend="triton")

    index = torch.tensor(1)
    out = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(*leaves, index)
    expected = thought_attention_step(*leaves, 1, **rules)
    assert [name for name, *_ in calls] == ["attend_step"]
    assert isinstance(calls[0][6], Tensor) and calls[0][6] == 1
    grads, expected_grads = (torch.autograd.grad(x.sum(), leaves) for x in (out, expected))
    assert torch.equal(out, expected)
    assert all(torch.equal(x, y) for x, y in zip(grads, expected_grads, strict=True))
    assert len(calls) == 1
