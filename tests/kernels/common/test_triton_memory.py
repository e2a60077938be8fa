"""What the kernels touch, seen from Triton's interpreter: their own tensors, and nothing that another program stores.

A GPU shows neither: a load just beyond a tensor mostly finds memory of the process, and a race mostly ends well.
"""

from importlib import import_module

import numpy as np
import pytest
import torch

from qstar_kernels import (
    linear_log_prob,
    linear_log_prob_sum,
    mix_hidden,
    sample_linear,
    thought_attention,
    thought_attention_step,
)
from qstar_kernels.lm_head import logits
from qstar_kernels.testing import AttentionCase, attention_inputs

pytest.importorskip("triton")
interpreter = import_module("triton.runtime.interpreter")
launch = import_module("qstar_kernels.common.launch")
op = import_module("qstar_kernels.thought_attention.op")
primitives = import_module("qstar_kernels.common.primitives")

pytestmark = pytest.mark.skipif(not primitives.INTERPRETED, reason="the interpreter shows addresses, a GPU does not")

UNIT = 2  # bytes of the narrowest element
NOBODY, SEVERAL = -1, -2  # instead of a program's number


class LaunchWatch:
    """Holds every program of a launch to this: it touches elements of its arguments alone, each is stored once, and
    what one program stores no program loads afterwards and no other has loaded before.
    """

    def __init__(self, arguments: dict):
        tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
        self.inside = np.unique(np.concatenate([units_of(x) for x in tensors]))
        self.stored = np.zeros(len(self.inside), bool)
        self.reader = np.full(len(self.inside), NOBODY)

    def load(self, addresses: np.ndarray, size: int) -> None:
        units = self.find(addresses, size)
        assert not self.stored[units].any(), "loads what was stored"
        alone = np.isin(self.reader[units], (NOBODY, program()))
        self.reader[units] = np.where(alone, program(), SEVERAL)

    def store(self, addresses: np.ndarray, size: int) -> None:
        units = self.find(addresses, size)
        assert len(np.unique(units)) == len(units) and not self.stored[units].any(), "stores twice in one place"
        assert np.isin(self.reader[units], (NOBODY, program())).all(), "stores what another program loads"
        self.stored[units] = True

    def find(self, addresses: np.ndarray, size: int) -> np.ndarray:
        units = spread(addresses, size)
        found = np.minimum(np.searchsorted(self.inside, units), len(self.inside) - 1)
        outside = self.inside[found] != units
        assert not outside.any(), f"{outside.sum() * UNIT} bytes lie in none of the tensors"
        return found


def program() -> int:
    return interpreter.interpreter_builder.grid_idx[0]


def spread(addresses: np.ndarray, size: int) -> np.ndarray:
    """The units of elements of ``size`` bytes."""
    return (addresses.reshape(-1, 1).astype(np.int64) // UNIT + np.arange(size // UNIT)).reshape(-1)


def units_of(x: torch.Tensor) -> np.ndarray:
    """Those of the elements of x, and of none between them."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        offsets = (offsets[:, None] + np.arange(size) * stride).reshape(-1)
    return spread(x.data_ptr() + offsets * x.element_size(), x.element_size())


@pytest.fixture
def watched(monkeypatch) -> list[str]:
    """The names of the kernels that ran, each under a :class:`LaunchWatch`."""
    builder, watches, names = interpreter.InterpreterBuilder, [], []
    load, store, run = builder.create_masked_load, builder.create_masked_store, launch.Launch.run

    def size_of(pointers) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def watched_load(self, pointers, mask, *rest):
        watches[-1].load(pointers.data[mask.data], size_of(pointers))
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        watches[-1].store(pointers.data[mask.data], size_of(pointers))
        return store(self, pointers, value, mask, *rest)

    def watched_run(self):
        watches.append(LaunchWatch(self.arguments))
        run(self)
        names.append(self.kernel.fn.__name__)

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(launch.Launch, "run", watched_run)
    return names


def apart(x: torch.Tensor) -> torch.Tensor:
    """x with NaN between its rows and around it."""
    room = torch.full((*(size + 2 for size in x.shape[:-1]), x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    inner = room[(*(slice(1, size + 1) for size in x.shape[:-1]), slice(1, x.shape[-1] + 1))]
    return inner.copy_(x)


SMALL = AttentionCase(batch=2, heads=3, kv_heads=1, positions=9, rationales=2, tokens=3, width=24, value_width=40)
GRIDS = {
    "plain": SMALL,
    "every rule": SMALL._replace(window=5, softcap=2.0, sinks=True, text_start=True),
    "causal": SMALL._replace(tokens=0, positions=21),
    "a long thought": SMALL._replace(rationales=1, tokens=17, positions=2),
    "one position": SMALL._replace(positions=1, tokens=1),
    "a narrow window": SMALL._replace(window=1, heads=2, kv_heads=2),
}


@pytest.mark.parametrize("case", GRIDS.values(), ids=GRIDS)
def test_attention_stays_in_its_tensors(watched, case):
    inputs = attention_inputs(case, torch.float32)
    leaves = [apart(x.detach()).requires_grad_() for x in inputs.leaves]
    out = thought_attention(*leaves[:3], sinks=leaves[3] if case.sinks else None, **inputs.rules, backend="triton")
    grads = torch.autograd.grad(out, leaves, apart(torch.ones_like(out)))
    assert all(x.isfinite().all() for x in (out, *grads))
    assert set(watched) == {"forward_kernel", "query_gradient_kernel", "key_gradient_kernel"}


@pytest.mark.parametrize("name", ["plain", "every rule", "a narrow window"])
@pytest.mark.parametrize(("queries", "step"), [(9, 2), (4, 0)])
@pytest.mark.parametrize("positions", [None, [[0, 3, 4, 8], [-(2**62), 1, 2**62, 2**32 + 5]]], ids=["last", "given"])
def test_the_step_stays_in_its_tensors(watched, monkeypatch, name, queries, step, positions):
    """Where positions are given, wrong ones too: on a GPU nobody checks them."""
    case = GRIDS[name]
    inputs = attention_inputs(case, torch.float32)
    q, k, v = (x.detach() for x in inputs[:3])
    first = case.positions - queries
    thoughts = [x[:, :, first:, 1:].unflatten(3, (case.rationales, case.tokens)) for x in (k, v)]
    thoughts = [apart(x)[..., : step + 1, :] for x in thoughts]
    rules = {name: value for name, value in inputs.rules.items() if name != "rationales"} | {"sinks": inputs.sinks}
    text = [apart(x[:, :, :, 0]) for x in (k, v)]
    q = apart(q[:, :, first:, 1 :: case.tokens])
    if positions is not None:
        monkeypatch.setattr(op, "check_positions", lambda *_: None)
        rules["positions"] = torch.tensor(positions).repeat(1, 3)[:, :queries]
    with torch.no_grad():
        out = thought_attention_step(q, *text, *thoughts, step, **rules, backend="triton")
    assert out.isfinite().all() and watched == ["step_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("indexed", [False, True])
def test_mixing_stays_in_its_tensors(watched, dtype, indexed):
    rows, width = 5, 67
    base_index = torch.tensor([3, 0, 3, 3, 1]) if indexed else None
    base, thought, features = (apart(torch.randn(rows, width, dtype=dtype)).requires_grad_() for _ in range(3))
    leaves = [base, thought, features, apart(torch.randn(width, dtype=dtype)).requires_grad_()]
    mixed, w = mix_hidden(*leaves, base_index=base_index, sigmoid=True, backend="triton")
    grads = torch.autograd.grad((mixed, w), leaves, (apart(torch.ones_like(mixed)), torch.ones(rows)))
    assert all(x.isfinite().all() for x in (mixed, w, *grads))
    assert watched == ["mix_kernel", "mix_gradient_kernel", "base_gradient_kernel"]


@pytest.mark.parametrize("vocabulary", [1, 131, 300])
def test_scores_and_draws_stay_in_their_tensors(watched, monkeypatch, vocabulary):
    monkeypatch.setattr(logits, "CPU_CHUNK_ROWS", 3)
    rows, width = 5, 7
    sizes = (rows, width), (vocabulary, width), (vocabulary,)
    hidden, weight, bias = (apart(torch.randn(size)).requires_grad_() for size in sizes)
    targets = torch.arange(rows) % vocabulary
    options = {"bias": bias, "softcap": 2.0, "backend": "triton"}
    log_prob, entropy = linear_log_prob(hidden, weight, targets, return_entropy=True, **options)
    (log_prob.sum() + entropy.sum()).backward()
    linear_log_prob_sum(hidden, weight, targets, torch.rand(rows), **options)[0].backward()
    sample_linear(hidden, weight, seed=1, log_prob_temperature=0.7, rows=torch.arange(rows), **options)
    sample_linear(hidden, weight, seed=1, temperature=0.0, **options)
    assert set(watched) == {"score_kernel", "gradient_kernel", "weigh_tiles_kernel", "draw_kernel"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_in_the_place_of_the_logits(watched, dtype):
    """Narrower than the logits: a CPU's factors are always float32."""
    rows = import_module("qstar_kernels.lm_head.triton.rows")
    head = rows.Rows(torch.randn(300, 1, dtype=dtype), None, None, logits.LogitMap(1.0, 1.0, None))
    targets, d_log_prob = torch.tensor([299, 0, 128]), torch.ones(3)
    head.gradient(torch.randn(3, 304), targets, d_log_prob, None, None, torch.empty(3), head.weight.dtype)
    assert watched == ["gradient_kernel"]


def test_an_access_that_is_wrong_is_seen():
    x = torch.zeros(2, 5)
    first, last, beyond = (np.array([x[place].data_ptr()]) for place in ((0, 0), (1, 3), (0, 4)))
    watch, builder = LaunchWatch({"x": x[:, :4], "window": 3}), interpreter.interpreter_builder
    builder.set_grid_dim(2, 1, 1)
    builder.set_grid_idx(0, 0, 0)
    watch.load(np.concatenate([first, last]), 4)
    with pytest.raises(AssertionError, match="4 bytes lie in none"):
        watch.load(np.concatenate([first, beyond]), 4)
    watch.store(first, 4)
    with pytest.raises(AssertionError, match="loads what was stored"):
        watch.load(first + 2, 2)
    builder.set_grid_idx(1, 0, 0)
    with pytest.raises(AssertionError, match="stores twice"):
        watch.store(first, 2)
    with pytest.raises(AssertionError, match="stores what another program loads"):
        watch.store(last, 4)
    watch.load(last, 4)
    builder.set_grid_idx(0, 0, 0)
    with pytest.raises(AssertionError, match="stores what another program loads"):
        watch.store(last, 4)
