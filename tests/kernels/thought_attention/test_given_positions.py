"""Thoughts at given positions of a text, not at its last ones: those rows of the packed op."""

import itertools
from importlib import import_module

import pytest
import torch
from torch.autograd import gradcheck

from qstar_kernels import thought_attention, thought_attention_part, thought_attention_step
from qstar_kernels.testing import AttentionCase, AttentionInputs, assert_close, attention_inputs

blocks = import_module("qstar_kernels.thought_attention.torch.blocks")
by_blocks = import_module("qstar_kernels.thought_attention.torch.blocked")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the Triton kernels
RULES = [
    {"window": window, "softcap": softcap, "sinks": sinks, "text_start": start}
    for window, softcap, sinks, start in itertools.product((None, 4), (None, 2.0), (False, True), (False, True))
]
CASE = AttentionCase(positions=9, rationales=2, tokens=3, value_width=4)
FLASH = CASE._replace(width=8, value_width=8, positions=61)
POSITIONS = {
    "ascending": torch.tensor([[0, 3, 4, 8], [1, 2, 5, 6]]),
    "in any order": torch.tensor([[7, 0, 8, 3], [2, 6, 1, 2]]),
    "one": torch.tensor([[4], [0]]),
    "all": torch.arange(9).expand(2, -1),
}


@pytest.fixture(params=["one block", "many blocks"])
def blocked(request, monkeypatch):
    if request.param == "many blocks":
        monkeypatch.setattr(blocks, "SCORES_ON_CPU", 100)
        monkeypatch.setattr(blocks, "ROWS", 1)


def taken(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of x [B, H, N, ...] what stands at the positions [B, n]: [B, H, n, ...]."""
    return torch.stack([row[:, here] for row, here in zip(x, positions, strict=True)])


def part_inputs(case: AttentionCase, inputs: AttentionInputs, positions: torch.Tensor) -> tuple[list, dict]:
    """What the thoughts at the positions are given, and the rules."""
    shape = (case.rationales, case.tokens)
    q, k, v = (taken(x[:, :, :, 1:].unflatten(3, shape), positions) for x in inputs[:3])
    rules = {name: value for name, value in inputs.rules.items() if name != "rationales"}
    return [q, inputs.k[:, :, :, 0], inputs.v[:, :, :, 0], k, v], rules | dict(sinks=inputs.sinks, positions=positions)


def packed_rows(case: AttentionCase, inputs: AttentionInputs, positions: torch.Tensor) -> tuple:
    """The thoughts' rows of the packed op at the positions, out and lse."""
    result = thought_attention(*inputs[:3], sinks=inputs.sinks, **inputs.rules, return_lse=True, backend="reference")
    return tuple(taken(x[:, :, :, 1:].unflatten(3, (case.rationales, case.tokens)), positions) for x in result)


def assert_same(found: torch.Tensor, expected: torch.Tensor, leaves: list, exact: list) -> None:
    """The results and the gradients of all that they were made from."""
    assert_close(found, expected)
    do = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(found, leaves, do.to(found.dtype), retain_graph=True)
    wanted = torch.autograd.grad(expected, exact, do.to(found.dtype).double(), retain_graph=True)
    for grad, right in zip(grads, wanted, strict=True):
        assert_close(grad, right, gradient=True)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("at", POSITIONS)
def test_a_part_at_given_positions_is_those_rows_of_the_packed_op(at, rules, backend, blocked):
    """Its results and all its gradients."""
    case, positions = CASE._replace(**rules), POSITIONS[at]
    inputs = attention_inputs(case)
    arguments, given = part_inputs(case, inputs, positions)
    out = thought_attention_part(*arguments, **given, backend=backend)
    assert_same(out, packed_rows(case, inputs, positions)[0], inputs.leaves, inputs.leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("at", POSITIONS)
def test_a_step_at_given_positions_is_those_rows_of_the_packed_op(at, rules, backend, blocked):
    case, positions = CASE._replace(**rules), POSITIONS[at]
    inputs = attention_inputs(case)
    (q, *arguments), given = part_inputs(case, inputs, positions)
    expected, expected_lse = packed_rows(case, inputs, positions)
    for step in range(case.tokens):
        options = dict(return_lse=True, backend=backend)
        out, lse = thought_attention_step(q[..., step, :], *arguments, step, **given, **options)
        assert_same(out, expected[..., step, :], inputs.leaves, inputs.leaves)
        assert_close(lse, expected_lse[..., step])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("rationales", "count"), [(1, 40), (2, 7), (3, 16)])
def test_given_positions_by_flash_attention(monkeypatch, dtype, sinks, rationales, count):
    """Of a part and of a step whose scores do not fit into one block."""
    case = FLASH._replace(sinks=sinks, rationales=rationales)
    generator = torch.Generator().manual_seed(2)
    positions = torch.rand(case.batch, case.positions, generator=generator).argsort(1)[:, :count].sort(1).values
    inputs, exact = attention_inputs(case, dtype), attention_inputs(case)
    monkeypatch.setattr(blocks, "SCORES_ON_CPU", 100)
    monkeypatch.setattr(by_blocks, "attend", None)
    (q, *arguments), given = part_inputs(case, inputs, positions)
    expected, expected_lse = packed_rows(case, exact, positions)
    assert_same(thought_attention_part(q, *arguments, **given), expected, inputs.leaves, exact.leaves)
    out, lse = thought_attention_step(q[..., 1, :], *arguments, 1, **given, return_lse=True)
    assert_same(out, expected[..., 1, :], inputs.leaves, exact.leaves)
    assert_close(lse, expected_lse[..., 1])


def test_given_positions_of_a_long_text():
    """With as many scores as any library of products wants to see."""
    case = AttentionCase(1, 2, 1, positions=600, rationales=4, tokens=16, width=32, value_width=32)
    positions = torch.rand(1, 600, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :64].sort(1).values
    inputs, exact = attention_inputs(case, torch.float32), attention_inputs(case)
    arguments, given = part_inputs(case, inputs, positions)
    expected = thought_attention(*exact[:3], **exact.rules, backend="torch")  # which is held to the reference elsewhere
    expected = taken(expected[:, :, :, 1:].unflatten(3, (4, 16)), positions)
    assert_same(thought_attention_part(*arguments, **given), expected, inputs.leaves, exact.leaves)


@pytest.mark.parametrize("rules", [RULES[0], RULES[-1]], ids=["plain", "all rules"])
@pytest.mark.parametrize("at", POSITIONS)
def test_triton_kernels_read_given_positions(at, rules):
    pytest.importorskip("triton")
    case, positions = CASE._replace(width=16, value_width=16, **rules), POSITIONS[at]
    inputs, exact = attention_inputs(case, torch.float32), attention_inputs(case)
    arguments, given = part_inputs(case, inputs, positions)
    q, *arguments = (x.to(DEVICE) for x in arguments)
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    expected, expected_lse = packed_rows(case, exact, positions)
    out = thought_attention_part(q, *arguments, **given, backend="triton").cpu()
    assert_same(out, expected, inputs.leaves, exact.leaves)
    out, lse = thought_attention_step(q[..., 1, :], *arguments, 1, **given, return_lse=True, backend="triton")
    assert_same(out.cpu(), expected[..., 1, :], inputs.leaves, exact.leaves)
    assert_close(lse.cpu(), expected_lse[..., 1])


def test_gradients_at_given_positions_are_those_of_finite_differences():
    case = CASE._replace(batch=1, positions=4, sinks=True)
    arguments, given = part_inputs(case, attention_inputs(case), torch.tensor([[0, 2]]))
    leaves = [x.detach().requires_grad_() for x in (*arguments, given["sinks"])]
    positions = given["positions"]
    assert gradcheck(lambda *x: thought_attention_part(*x[:5], sinks=x[5], positions=positions), leaves)


def test_what_follows_a_given_position_has_no_influence():
    """Bit for bit, nor on the gradients."""
    positions = torch.tensor([[0, 3], [2, 5]])
    (q, k_text, v_text, *thoughts), given = part_inputs(CASE, attention_inputs(CASE), positions)
    leaves = [k_text.detach().requires_grad_(), v_text.detach().requires_grad_()]
    before = thought_attention_part(q, *leaves, *thoughts, **given)
    grads = torch.autograd.grad(before.sum(), leaves)
    k_text, v_text = (x.detach().clone() for x in leaves)
    for row, last in enumerate(positions[:, -1]):
        k_text[row, :, last + 1 :], v_text[row, :, last + 1 :] = 50.0, -1e30
        assert all(torch.equal(x[row, :, last + 1 :], torch.zeros_like(x[row, :, last + 1 :])) for x in grads)
        assert all(x[row, :, : last + 1].abs().min() > 0 for x in grads)
    assert torch.equal(thought_attention_part(q, k_text, v_text, *thoughts, **given), before)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (torch.tensor([[0, 9], [1, 2]]), ValueError, r"positions has 9, but all must be in 0\.\.8, those of k_text"),
        (torch.tensor([[0, 8], [-1, 2]]), ValueError, r"positions has -1, but all must be in 0\.\.8"),
        (torch.tensor([0, 8]), ValueError, r"positions has shape \[2\]"),
        (torch.tensor([[0, 8, 2], [1, 2, 3]]), ValueError, r"positions has shape \[2, 3\]"),
        (torch.tensor([[0, 8], [1, 2]], dtype=torch.int32), TypeError, r"positions has dtype torch\.int32"),
        ([[0, 8], [1, 2]], TypeError, "positions"),
    ],
)
def test_wrong_positions_are_named(positions, error, message):
    (q, *arguments), _ = part_inputs(CASE, attention_inputs(CASE), torch.tensor([[0, 8], [1, 2]]))
    with pytest.raises(error, match=message):
        thought_attention_part(q, *arguments, positions=positions)
    with pytest.raises(error, match=message):
        thought_attention_step(q[..., 0, :], *arguments, 0, positions=positions)
