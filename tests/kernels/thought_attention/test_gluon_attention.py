"""The Hopper kernels against the specification: on such a card where there is one, else in an emulator of Gluon."""

from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from qstar_kernels import thought_attention
from qstar_kernels.testing import AttentionCase, assert_close, attention_inputs

pytest.importorskip("triton")
emulator = import_module("gluon_emulator")
cases = import_module("qstar_kernels.thought_attention.cases")
attention = import_module("qstar_kernels.thought_attention.triton.attention")
launches = import_module("qstar_kernels.thought_attention.triton.launches")
hopper = import_module("qstar_kernels.thought_attention.gluon.launches")
tiles = import_module("qstar_kernels.thought_attention.triton.tiles")
launch = import_module("qstar_kernels.common.launch")
Rules = import_module("qstar_kernels.thought_attention.rules").Rules
Launch, Tile = launch.Launch, launch.Tile

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available() and not ON_HOPPER, reason="needs a card of capability 9.0"),
    pytest.mark.usefixtures("poisoned"),
]
DEVICE = "cuda" if ON_HOPPER else "cpu"

TILES = {
    "hopper_forward": Tile(128, 64, 4, 2),
    "hopper_query_gradient": Tile(128, 64, 4, 2),
    "hopper_text_gradient": Tile(64, 128, 4, 2),
}
SMALL = AttentionCase(batch=1, heads=4, kv_heads=2, positions=40, tokens=5, width=64, value_width=64)
CASES = {
    "one thought": SMALL,
    "several sequences": SMALL._replace(batch=2, positions=21),
    "two rationales": SMALL._replace(rationales=2, tokens=3, positions=33),
    "no group": SMALL._replace(heads=2, positions=70),
    "group of eight": SMALL._replace(heads=8, kv_heads=1),
    "group of sixty-four": SMALL._replace(heads=64, kv_heads=1, positions=9),
    "thoughts of one token": SMALL._replace(tokens=1, rationales=3),
    "long thoughts": SMALL._replace(positions=4, tokens=70, heads=2),
    "causal": SMALL._replace(tokens=0, positions=300),
    "one position": SMALL._replace(positions=1),
    "128 wide": SMALL._replace(width=128, value_width=128),
}  # fmt: skip


@pytest.fixture
def used(monkeypatch):
    """The Hopper kernels in the place of the others, two programs of each; what was launched."""
    launched, run = [], Launch.run

    def run_or_emulate(self):
        launched.append(self.kernel)
        if self.language == "gluon" and not ON_HOPPER:
            emulator.run(self)
        else:
            run(self)

    monkeypatch.setattr(Launch, "run", run_or_emulate)
    monkeypatch.setattr(hopper, "processors", lambda device: 2)
    monkeypatch.setattr(hopper, "section", lambda k: 3)  # of four pairs where there are two sequences
    monkeypatch.setattr(attention, "PROGRAMS", 3)  # so that the rows of a tile of keys are shared out here as well
    with ExitStack() as stack:
        for kernel, tile in TILES.items():
            stack.enter_context(tiles.TABLE.trying(kernel, tile))
        yield launched


def run(leaves, rules, do, backend):
    out, lse = thought_attention(*leaves, **rules, return_lse=True, backend=backend)
    return [out, lse, *torch.autograd.grad(out, leaves, do.to(out.dtype))]


def results(case: AttentionCase, dtype=torch.bfloat16, strided=True):
    """Ours, and the specification's in float64 for the same inputs."""
    inputs = attention_inputs(case, dtype, strided=strided)
    do = attention_inputs(case, dtype, strided=strided, seed=1).q.detach()
    ours = run([x.detach().to(DEVICE).requires_grad_() for x in inputs.leaves], inputs.rules, do.to(DEVICE), "triton")
    exact = [x.detach().double().requires_grad_() for x in inputs.leaves]
    return [x.cpu() for x in ours], run(exact, inputs.rules, do, "reference")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gluon_equals_reference(used, case):
    ours, expected = results(case)
    assert {kernel for kernel in used if kernel is not launches.key_gradient_kernel} == {
        hopper.forward_kernel,
        hopper.query_gradient_kernel,
        hopper.text_gradient_kernel,
    }
    assert_close(ours[0], expected[0], name="out")
    assert (ours[1] - expected[1]).abs().max() < 1e-5
    for name, x, y in zip(("dq", "dk", "dv"), ours[2:], expected[2:], strict=True):
        assert_close(x, y, gradient=True, name=name)


def test_rows_that_only_the_forward_takes(used):
    with cases.all_for_hopper(256):
        ours, expected = results(SMALL._replace(positions=11, heads=2, width=256, value_width=256))
    assert used[0] is hopper.forward_kernel and used[1] is launches.query_gradient_kernel
    for x, y, gradient in zip(ours, expected, (False, False, True, True, True), strict=True):
        assert_close(x.bfloat16(), y, gradient=gradient)


def test_half_precision_and_heads_outside_slots(used):
    ours, expected = results(SMALL, torch.float16, strided=False)
    assert hopper.forward_kernel in used and hopper.text_gradient_kernel in used
    for x, y, gradient in zip(ours, expected, (False, False, True, True, True), strict=True):
        assert_close(x.half(), y, gradient=gradient)


def test_a_thought_reaches_no_other_position(used):
    case = SMALL._replace(rationales=2, tokens=4)
    inputs = attention_inputs(case, torch.bfloat16)
    q, k, v = (x.detach().to(DEVICE) for x in inputs.leaves)
    before = thought_attention(q, k, v, rationales=2, backend="triton")
    changed = 17, slice(5, 9)  # the second thought of a position
    k, v = k.clone(), v.clone()
    k[:, :, *changed] += 1
    v[:, :, *changed] -= 1
    after = thought_attention(q, k, v, rationales=2, backend="triton")
    assert used == [hopper.forward_kernel] * 2
    assert (before[:, :, *changed] != after[:, :, *changed]).any(-1).all()
    before[:, :, *changed] = after[:, :, *changed]
    assert torch.equal(before, after)


@pytest.mark.slow
def test_a_repeat_gives_the_same_bits(used, monkeypatch):
    monkeypatch.setattr(emulator.Program, "seed", 0, raising=False)
    first, _ = results(SMALL)
    monkeypatch.setattr(emulator.Program, "seed", 100, raising=False)
    second, _ = results(SMALL)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def refused(**changes) -> bool:
    q, k = torch.zeros(2, 4, 8, 6, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 8, 6, 64, dtype=torch.bfloat16)
    given = {"rules": Rules(0.125), "group": 2, "q": q, "k": k, "v": k} | changes
    return not hopper.serves(given["rules"], given["group"], given["q"], given["k"], given["v"])


@pytest.mark.parametrize(
    "changes",
    [
        {"rules": Rules(0.125, window=5)},
        {"rules": Rules(0.125, softcap=5.0)},
        {"rules": Rules(0.125, sinks=torch.zeros(4))},
        {"rules": Rules(0.125, text_start=torch.zeros(2, 8))},
        {"rules": Rules(-0.125)},
        {"rules": Rules(0.0)},
        {"rules": Rules(1e-46)},
        {"rules": Rules(float("nan"))},
        {"group": 3},
        {"group": 128},
        {"v": torch.zeros(2, 2, 8, 6, 128, dtype=torch.bfloat16)},
        {"q": torch.zeros(2, 4, 8, 6, 64)},
        {"q": torch.zeros(2, 4, 8, 6, 65, dtype=torch.bfloat16)[..., 1:]},
        {"q": torch.zeros(2, 4, 8, 6, 128, dtype=torch.bfloat16)[..., 1:65]},
        {"k": torch.zeros(2, 2, 8, 12, 64, dtype=torch.bfloat16)[:, :, :, :6]},
        {"k": torch.zeros(2, 1, 8, 6, 64, dtype=torch.bfloat16).expand(2, 2, 8, 6, 64)},
        {"k": torch.zeros(2, 2, 8, 6, 68, dtype=torch.bfloat16)[..., :64]},
    ],
    ids=["window", "soft-cap", "sinks", "text start", "negative scale", "no scale",
         "a scale below float32", "a scale of NaN", "group of three", "large group",
         "wide values", "float32", "address", "address within rows", "gaps between positions", "shared heads",
         "strides"],
)  # fmt: skip
def test_what_the_copy_engine_cannot_do_goes_to_plain_triton(changes):
    assert not refused()
    assert refused(**changes)


def test_keys_and_values_of_a_section_fit_the_cache():
    def section(positions):
        return hopper.section(torch.empty(8, 8, positions, 17, 128, dtype=torch.bfloat16, device="meta"))

    assert [section(positions) for positions in (64, 1024, 4096, 2**20)] == [64, 32, 8, 1]


def test_a_window_that_hides_nothing_is_none():
    q = torch.zeros(1, 2, 8, 6, 64, dtype=torch.bfloat16)
    with tiles.TABLE.trying("hopper_forward", TILES["hopper_forward"]):
        found = [launches.gluon_in_place("forward", "sm_90", 1, Rules(1.0, window=w), q, q) for w in (13, 12)]
    assert found == [(hopper, TILES["hopper_forward"]), None]


@pytest.fixture
def in_double(monkeypatch):
    """Let the kernels be launched, in the emulator, on float64."""
    if ON_HOPPER:
        pytest.skip("for the emulator")

    class Descriptor(SimpleNamespace):
        def __init__(self, base, shape, strides, block_shape, layout):
            super().__init__(base=base, shape=shape, strides=strides, block_shape=block_shape)

    monkeypatch.setattr(hopper, "section", lambda k: 3)
    monkeypatch.setattr(hopper, "TensorDescriptor", Descriptor)
    monkeypatch.setattr(emulator, "TensorDescriptor", Descriptor)
    monkeypatch.setitem(hopper.ELEMENTS, torch.float64, hopper.gl.bfloat16)


DOUBLE = AttentionCase(batch=2, heads=4, kv_heads=2, positions=37, tokens=5, width=16, value_width=16)
DOUBLE_CASES = {
    "one thought": (DOUBLE, 1),
    "shares": (DOUBLE._replace(positions=150, batch=1), 3),
    "more shares than rows": (DOUBLE._replace(positions=3), 5),
    "three rationales": (DOUBLE._replace(rationales=3, tokens=16, positions=33, heads=8, kv_heads=1, batch=1), 1),
    "causal": (DOUBLE._replace(tokens=0, positions=200), 2),
    "no group": (DOUBLE._replace(heads=2, positions=90), 1),
    "tiles of one cell": (DOUBLE._replace(batch=1, heads=64, kv_heads=1, tokens=0, positions=140), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("keys", [64, 128])
@pytest.mark.parametrize("case, splits", DOUBLE_CASES.values(), ids=DOUBLE_CASES)
def test_gluon_is_exact_in_double(in_double, case, splits, keys):
    inputs = attention_inputs(case)
    do = attention_inputs(case, seed=1).q.detach()
    expected = run(inputs.leaves, inputs.rules, do, "reference")
    q, k, v = (x.detach() for x in inputs.leaves)
    rules, tile = Rules(case.width**-0.5), Tile(128, keys, 4, 2)
    out, lse, delta, dq = torch.empty_like(q), torch.empty(q.shape[:-1]), torch.empty(q.shape[:-1]), torch.empty_like(q)
    lse, delta = lse.double(), delta.double()
    dk, dv = torch.empty(2, splits, *k[:, :, :, :1].shape, dtype=torch.float64)
    for made in (
        hopper.forward_launch(q, k, v, case.rationales, rules, out, lse, tile),
        hopper.query_gradient_launch(do, out, lse, delta, q, k, v, case.rationales, rules, dq, tile),
        hopper.text_gradient_launch(
            do, lse, delta, q, k, v, case.rationales, rules, dk, dv, Tile(keys, 128, 4, 3)
        ),
    ):  # fmt: skip
        emulator.run(replace(made, programs=min(made.programs, 3)) if "works" in made.arguments else made)
    found = out, lse, dq, dk.sum(0), dv.sum(0)
    text = expected[3][:, :, :, :1], expected[4][:, :, :, :1]
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, (*expected[:3], *text), strict=True):
        assert_close(x, y, name=name)
    assert_close(delta, (expected[0] * do).sum(-1), name="delta")
