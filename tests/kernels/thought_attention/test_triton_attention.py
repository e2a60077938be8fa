"""The Triton kernels against the specification: on a GPU where there is one, else in Triton's interpreter."""

from importlib import import_module

import pytest
import torch

from qstar_kernels import thought_attention, thought_attention_step
from qstar_kernels.testing import AttentionCase, AttentionInputs, assert_close, attention_inputs

pytest.importorskip("triton")
attention = import_module("qstar_kernels.thought_attention.triton.attention")
launches = import_module("qstar_kernels.thought_attention.triton.launches")

pytestmark = pytest.mark.usefixtures("poisoned")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

SMALL = AttentionCase(batch=1, heads=2, kv_heads=1, positions=19, tokens=3, width=16, value_width=16)
CASES = {
    "several tiles of keys": SMALL._replace(positions=37),
    "several heads and sequences": SMALL._replace(batch=2, heads=4, kv_heads=2, positions=7),
    "two rationales": SMALL._replace(rationales=2),
    "group of seven": SMALL._replace(heads=7, positions=5),
    "no group": SMALL._replace(heads=2, kv_heads=2, positions=9),
    "thought longer than a tile": SMALL._replace(positions=3, tokens=24),
    "thoughts of one token": SMALL._replace(rationales=3, tokens=1, positions=9),
    "causal": SMALL._replace(tokens=0, positions=37),
    "one position": SMALL._replace(positions=1),
    "wide values": SMALL._replace(positions=7, value_width=40),
    "narrow values": SMALL._replace(positions=7, width=40),
    "80 wide": SMALL._replace(positions=4, width=80, value_width=80),
    "96 wide": SMALL._replace(positions=4, width=96, value_width=96),
    "256 wide": SMALL._replace(positions=3, width=256, value_width=256),
    "window": SMALL._replace(window=5),
    "window of several tiles": SMALL._replace(window=5, positions=33),
    "window within a thought": SMALL._replace(window=2, positions=7),
    "soft-cap": SMALL._replace(softcap=1.5, positions=7),
    "sinks": SMALL._replace(sinks=True, positions=7),
    "text start": SMALL._replace(text_start=True),
    "all rules": SMALL._replace(
        heads=4, kv_heads=2, rationales=2, window=6, softcap=2.0, sinks=True, text_start=True
    ),
}  # fmt: skip


def exact(inputs: AttentionInputs) -> AttentionInputs:
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs[:4]]
    return AttentionInputs(*leaves, inputs.rules)


def on_device(inputs: AttentionInputs) -> AttentionInputs:
    leaves = [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in inputs[:4]]
    rules = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.rules.items()}
    return AttentionInputs(*leaves, rules)


def run(inputs, do, backend="triton"):
    out, lse = thought_attention(*inputs[:3], sinks=inputs.sinks, **inputs.rules, return_lse=True, backend=backend)
    return out, lse, torch.autograd.grad(out, inputs.leaves, do.to(out).expand(out.shape))


def assert_equals_reference(inputs, do=None):
    inputs = on_device(inputs)
    shape = (*inputs.q.shape[:-1], inputs.v.shape[-1])
    if do is None:
        do = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    do = do.to(DEVICE, inputs.q.dtype)
    out, lse, grads = run(inputs, do)
    expected_out, expected_lse, expected_grads = run(exact(inputs), do, backend="reference")
    assert_close(out, expected_out, name="out")
    if inputs.q.dtype == torch.float32:
        assert_close(lse, expected_lse, name="lse")
    for name, grad, expected in zip(("dq", "dk", "dv", "dsinks"), grads, expected_grads, strict=False):
        assert_close(grad, expected, gradient=True, name=name)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_triton_equals_reference(case):
    assert_equals_reference(attention_inputs(case, torch.float32))


def test_triton_equals_reference_without_shares(monkeypatch):
    monkeypatch.setattr(attention, "PROGRAMS", 0)
    assert_equals_reference(attention_inputs(SMALL, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rules", [{}, {"window": 9, "softcap": 2.0, "sinks": True}], ids=["plain", "rules"])
def test_rounding_stays_within_the_rule(dtype, rules):
    case = SMALL._replace(positions=33, width=32, value_width=32, **rules)
    assert_equals_reference(attention_inputs(case, dtype))


def test_inputs_and_gradients_may_have_any_strides():
    case = SMALL._replace(positions=5, kv_heads=2)
    assert_equals_reference(attention_inputs(case, torch.float32, strided=False))
    inputs = attention_inputs(case, torch.float32)
    assert_equals_reference(inputs, do=torch.ones(()))
    shared = inputs.k[:, :, :1].detach().expand_as(inputs.k)
    every_other = inputs.v.detach().repeat_interleave(2, dim=-1)[..., ::2]
    assert_equals_reference(inputs._replace(k=shared, v=every_other))


def test_sinks_may_have_any_strides():
    inputs = attention_inputs(SMALL._replace(heads=4, positions=5, sinks=True), torch.float32)
    assert_equals_reference(inputs._replace(sinks=inputs.sinks.detach().repeat_interleave(2)[::2]))
    assert_equals_reference(inputs._replace(sinks=inputs.sinks.detach()[:1].expand(4)))


@pytest.mark.parametrize("window", [2**28, 2**31 - 1, 2**40], ids=str)
def test_a_window_that_hides_nothing(window):
    inputs = on_device(attention_inputs(SMALL._replace(positions=7), torch.float32))
    do = torch.randn((), dtype=torch.float64)
    (out, lse, grads), expected = (
        run(inputs._replace(rules=inputs.rules | {"window": each}), do) for each in (window, None)
    )
    assert all(torch.equal(x, y) for x, y in zip((out, lse, *grads), (*expected[:2], *expected[2]), strict=True))


@pytest.mark.parametrize(
    ("stride", "copied"),
    [((0, 0, 2**23, 2**10, 1), True), ((0, 0, 2**22, 2**10, 1), False), ((0, 0, 1, 2**30, 1), True)],
)
def test_what_32_bits_cannot_address_is_copied(stride, copied):
    x = torch.empty_strided((1, 1, 3, 9, 16), stride, device="meta")
    assert (attention.reachable(x) is x) != copied


def test_products_are_exact_unless_torch_and_the_card_allow_others():
    cards = ("sm_80", "sm_100", "gfx942", "gfx90a", "gfx1100")
    before = torch.get_float32_matmul_precision()
    assert {launches.precision(torch.float32, card) for card in cards} == {"ieee"}
    try:
        torch.set_float32_matmul_precision("high")
        assert [launches.precision(torch.float32, card) for card in cards] == ["tf32", "tf32", "tf32", "ieee", "ieee"]
        assert {launches.precision(torch.bfloat16, card) for card in cards} == {"ieee"}
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_nan_is_not_hidden(backend):
    inputs = on_device(attention_inputs(SMALL._replace(positions=3), torch.float32))
    q = inputs.q.detach().clone()
    q[0, 1, 1, 2] = torch.nan
    out, lse = thought_attention(q, *inputs[1:3], return_lse=True, backend=backend)
    hit = torch.zeros_like(lse, dtype=torch.bool)
    hit[0, 1, 1, 2] = True
    assert torch.equal(lse.isnan(), hit) and torch.equal(out.isnan().all(-1), hit)


def test_other_thoughts_and_later_text_have_no_influence():
    case = SMALL._replace(rationales=2, positions=9)
    inputs = on_device(attention_inputs(case, torch.float32))
    do = torch.ones((), dtype=torch.float64)
    before = run(inputs, do)
    k, v = inputs.k.detach().clone(), inputs.v.detach().clone()
    k[:, :, 5, 4:] += 100
    v[:, :, 5, 4:] -= 1e6
    k[:, :, 7:, 0], v[:, :, 7:, 0] = 50.0, -50.0
    after = run(inputs._replace(k=k.requires_grad_(), v=v.requires_grad_()), do)
    keep = torch.ones(case.positions, case.slots, dtype=torch.bool)
    keep[5, 4:], keep[7:] = False, False
    for x, y in ((before[0], after[0]), (before[1], after[1]), (before[2][0], after[2][0])):
        assert torch.equal(x[:, :, keep], y[:, :, keep])
        assert not torch.equal(x[:, :, ~keep], y[:, :, ~keep])


@pytest.mark.slow
def test_repeats_bit_for_bit():
    case = CASES["all rules"] if ON_GPU else SMALL._replace(positions=3, tokens=2, window=3, softcap=2.0, sinks=True)
    inputs = on_device(attention_inputs(case, torch.float32))
    do = torch.randn((), dtype=torch.float64)
    first = run(inputs, do)
    for _ in range(20):
        again = run(inputs, do)
        assert all(torch.equal(x, y) for x, y in zip((*first[:2], *first[2]), (*again[:2], *again[2]), strict=True))


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks):
    inputs = attention_inputs(SMALL._replace(positions=4, sinks=sinks), torch.float32)
    inputs.rules["text_start"] = torch.tensor([[9, 4, 0, -3]], dtype=torch.int32)
    assert_equals_reference(inputs)
    inputs = on_device(inputs)
    out, lse, grads = run(inputs, torch.ones(()))
    assert torch.equal(out[:, :, :2, 0], torch.zeros_like(out[:, :, :2, 0]))
    assert torch.equal(grads[0][:, :, :2, 0], torch.zeros_like(grads[0][:, :, :2, 0]))
    expected = inputs.sinks.detach()[None, :, None] if sinks else torch.tensor(-torch.inf)
    torch.testing.assert_close(lse[:, :, :2, 0], expected.expand(1, 2, 2).to(DEVICE))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_sink_that_is_not_there_learns_nothing(backend):
    """Nor where a row sees nothing at all."""
    inputs = on_device(attention_inputs(SMALL._replace(positions=4, sinks=True, text_start=True), torch.float32))
    inputs.rules["text_start"] = torch.tensor([[9, 4, 0, -3]], device=DEVICE)
    sinks = inputs.sinks.detach().clone()
    sinks[0] = -torch.inf
    inputs = inputs._replace(sinks=sinks.requires_grad_())
    grads, expected = (run(x, torch.ones(()), name)[2] for x, name in ((inputs, backend), (exact(inputs), "reference")))
    assert grads[3][0] == 0
    assert_close(grads[3], expected[3], gradient=True)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"positions": 0}], ids=str)
def test_empty_grids_have_empty_results(empty):
    inputs = on_device(attention_inputs(SMALL._replace(sinks=True, **empty), torch.float32))
    out, lse, grads = run(inputs, torch.ones(()))
    assert out.numel() == lse.numel() == 0
    assert torch.equal(grads[3], torch.zeros_like(grads[3]))


STEPS = {
    "plain": (SMALL, 2, 19),
    "first token": (SMALL, 0, 19),
    "last positions": (SMALL._replace(rationales=2, heads=6, kv_heads=2, value_width=40), 1, 4),
    "group of seven": (SMALL._replace(heads=7, width=96, value_width=96, positions=7), 2, 7),
    "more heads than a tile has rows": (SMALL._replace(heads=17, positions=3), 1, 2),
    "twice as many": (SMALL._replace(heads=64, kv_heads=2, positions=3, rationales=2, sinks=True), 1, 2),
    "window within a thought": (SMALL._replace(window=2), 2, 19),
    "all rules": (SMALL._replace(rationales=2, window=6, softcap=2.0, sinks=True, text_start=True), 2, 13),
}


def step_inputs(case, step, queries, dtype):
    """Inputs of a step with NaN beyond it, and its rules."""
    inputs = attention_inputs(case, dtype)
    first = case.positions - queries
    slots = 1 + step + case.tokens * torch.arange(case.rationales)
    thoughts = [x.detach()[:, :, first:, 1:].unflatten(3, (case.rationales, case.tokens)).clone() for x in inputs[1:3]]
    for x in thoughts:
        x[..., step + 1 :, :] = torch.nan
    text = [x.detach()[:, :, :, 0] for x in inputs[1:3]]
    rules = {name: value for name, value in inputs.rules.items() if name != "rationales"} | {"sinks": inputs.sinks}
    tensors = [x.to(DEVICE) for x in (inputs.q.detach()[:, :, first:, slots], *text, *thoughts)]
    return tensors, {name: x.detach().to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in rules.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "step", "queries"), STEPS.values(), ids=STEPS)
def test_step_equals_reference(case, step, queries, dtype):
    tensors, rules = step_inputs(case, step, queries, dtype)
    out, lse = thought_attention_step(*tensors, step, **rules, return_lse=True, backend="triton")
    wide = [x.double().nan_to_num() for x in tensors]
    expected, expected_lse = thought_attention_step(*wide, step, **rules, return_lse=True, backend="reference")
    assert_close(out, expected)
    if dtype == torch.float32:
        assert_close(lse, expected_lse)
    on_device_step = torch.tensor(step, device=DEVICE)
    again = thought_attention_step(*tensors, on_device_step, **rules, backend="triton")
    assert torch.equal(again, out)


@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "step", "queries"), STEPS.values(), ids=STEPS)
def test_step_at_given_positions_equals_reference(case, step, queries, dtype, order):
    """Several tiles of rows and of keys; positions that are given twice as well."""
    case = case._replace(batch=2)
    tensors, rules = step_inputs(case, step, queries, dtype)
    drawn = torch.randint(0, case.positions, (2, queries), generator=torch.Generator().manual_seed(4))
    rules["positions"] = (drawn.sort(1).values if order == "ascending" else drawn).to(DEVICE)
    out, lse = thought_attention_step(*tensors, step, **rules, return_lse=True, backend="triton")
    wide = [x.double().nan_to_num() for x in tensors]
    expected, expected_lse = thought_attention_step(*wide, step, **rules, return_lse=True, backend="reference")
    assert_close(out, expected)
    if dtype == torch.float32:
        assert_close(lse, expected_lse)


def test_unsupported_tensors_are_refused():
    inputs = on_device(attention_inputs(SMALL))
    with pytest.raises(ValueError, match=r"backend is 'triton'.*float64"):
        thought_attention(*inputs[:3], backend="triton")
    narrow = on_device(attention_inputs(SMALL._replace(width=8), torch.float32))
    with pytest.raises(ValueError, match=r"backend is 'triton'.*rows of 8"):
        thought_attention(*narrow[:3], backend="triton")
