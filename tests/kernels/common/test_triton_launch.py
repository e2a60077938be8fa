"""What runs is what is compiled beforehand: Triton specialises a launch's arguments as ``Launch.compile`` writes them.

Triton's own way to a kernel up to the compiler, with a driver for a card that is not there.
"""

from dataclasses import replace
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from qstar_kernels import linear_log_prob, mix_hidden, sample_linear, thought_attention, thought_attention_step
from qstar_kernels.testing import AttentionCase, attention_inputs

triton = pytest.importorskip("triton")
launch = import_module("qstar_kernels.common.launch")
cases = import_module("qstar_kernels.thought_attention.cases")
GluonJITFunction = import_module("triton.experimental.gluon._runtime").GluonJITFunction
JITFunction = import_module("triton.runtime.jit").JITFunction

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def jitted(kernel):
    """The kernel as a card would get it, and nothing that it has been through: the interpreter has wrapped it."""
    if isinstance(kernel, GluonJITFunction):
        return GluonJITFunction(kernel.fn)
    options = getattr(kernel, "kwargs", None) or vars(kernel)
    return JITFunction(kernel.fn, do_not_specialize=options["do_not_specialize"])


@pytest.fixture
def compared(monkeypatch) -> list[str]:
    """The names of the kernels that were launched; of each, what runs has been compared with what is compiled."""
    target = launch.TARGETS["sm_90"]
    driver = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(**driver))
    monkeypatch.setattr(triton, "compile", lambda source, **_: source)
    jobs, names, run = [], [], launch.Launch.run
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda compile, **_: jobs.append(compile) or True)

    def compare(self):
        jobs.clear()
        on_card = replace(self, kernel=jitted(self.kernel))
        run(on_card)
        source = on_card.compile("sm_90")
        [attributes] = jobs[0]["configs"]
        name = self.kernel.fn.__name__
        assert source.signature == jobs[0]["signature"], name
        assert source.constants == jobs[0]["constants"], name
        assert source.attrs == {path: value for path, value in attributes.items() if value}, name
        names.append(name)

    monkeypatch.setattr(launch.Launch, "run", compare)
    return names


def unaligned(x):
    """Rows an odd number of elements apart, the first of them not at the beginning of a word."""
    return torch.cat([x, x[..., :1]], -1)[..., 1:]


def far(x):
    """A dimension of size 1 whose stride 32 bits cannot hold."""
    return x.as_strided(x.shape, (2**40, *x.stride()[1:]))


SMALL = AttentionCase(batch=1, heads=4, kv_heads=2, positions=19, tokens=3, width=64, value_width=64)
EVERY_RULE = SMALL._replace(batch=2, rationales=2, window=5, softcap=2.0, sinks=True, text_start=True)
SIXTEEN = AttentionCase(16, 16, 16, positions=16, tokens=16, width=16, value_width=32, window=16, softcap=16)
ONE = AttentionCase(1, 1, 1, positions=1, tokens=1, width=16, value_width=17, window=1, softcap=1)
GRIDS = {
    "plain": (SMALL, lambda x: x),
    "contiguous": (SMALL._replace(batch=2), lambda x: x.contiguous()),
    "unaligned": (SMALL, unaligned),
    "expanded": (SMALL, lambda x: x[:, :, :1].expand_as(x)),
    "far apart": (SMALL, far),
    "every rule": (EVERY_RULE, lambda x: x),
    "multiples of 16": (SIXTEEN, lambda x: x),
    "nothing but 1": (ONE, lambda x: x),
    "text alone": (ONE._replace(tokens=0, window=None, softcap=None), lambda x: x),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("case", "change"), GRIDS.values(), ids=GRIDS)
def test_attention_runs_as_it_is_compiled(compared, case, change, dtype):
    inputs = attention_inputs(case, dtype)
    q, k, v = (change(x.detach().to(DEVICE)).requires_grad_() for x in inputs[:3])
    rules = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.rules.items()}
    sinks = None if inputs.sinks is None else inputs.sinks.detach().to(DEVICE)
    out = thought_attention(q, k, v, sinks=sinks, **rules, backend="triton")
    torch.autograd.grad(out.sum(), (q, k, v))
    own = ["key_gradient_kernel"] * (case.tokens > 0)
    assert compared == ["forward_kernel", "query_gradient_kernel", *own, "key_gradient_kernel"]


@pytest.mark.parametrize("tokens", [0, 3, 15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_gluon_runs_as_it_is_compiled(compared, dtype, tokens):
    inputs = attention_inputs(SMALL._replace(batch=2, tokens=tokens, positions=16), dtype)
    q, k, v = (x.detach().to(DEVICE).requires_grad_() for x in inputs[:3])
    with cases.all_for_hopper(64):
        out = thought_attention(q, k, v, backend="triton")
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    own = ["key_gradient_kernel"] * (tokens > 0)
    assert compared == ["forward_kernel", "query_gradient_kernel", *own, "text_gradient_kernel"]


@pytest.mark.parametrize("case", [SMALL, EVERY_RULE, ONE], ids=["plain", "every rule", "nothing but 1"])
@pytest.mark.parametrize("step", [0, 1, torch.tensor(0), torch.tensor(0, dtype=torch.int32)], ids=repr)
def test_the_step_runs_as_it_is_compiled(compared, case, step):
    inputs = attention_inputs(case, torch.bfloat16)
    q, k, v = (x.detach().to(DEVICE) for x in inputs[:3])
    thoughts = [x[:, :, :, 1:].unflatten(3, (case.rationales, case.tokens)) for x in (k, v)]
    rules = {name: x for name, x in inputs.rules.items() if name != "rationales"} | {"sinks": inputs.sinks}
    if case is EVERY_RULE:
        rules["positions"] = torch.arange(case.positions).repeat(case.batch, 1)
    rules = {name: x.detach().to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in rules.items()}
    step = step.to(DEVICE) if isinstance(step, torch.Tensor) else min(step, case.tokens - 1)
    q = q[:, :, :, 1 :: case.tokens]
    thought_attention_step(q, k[:, :, :, 0], v[:, :, :, 0], *thoughts, step, **rules, backend="triton")
    assert compared == ["step_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows, vocabulary, width", [(7, 300, 24), (16, 2048, 16), (1, 1, 1)])
def test_scores_and_draws_run_as_they_are_compiled(compared, rows, vocabulary, width, dtype):
    torch.manual_seed(0)
    shapes = (rows, width), (vocabulary, width), (vocabulary,)
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, device=DEVICE).requires_grad_() for shape in shapes)
    targets = torch.arange(rows, device=DEVICE) % vocabulary
    every_rule = {"bias": bias, "softcap": 1, "logit_scale": 2}
    log_prob = linear_log_prob(hidden, weight, targets, backend="triton")
    log_prob.sum().backward()
    both = linear_log_prob(hidden, weight, targets, return_entropy=True, temperature=1, backend="triton", **every_rule)
    (both[0].sum() + both[1].sum()).backward()
    sample_linear(hidden, weight, seed=1, step=1, backend="triton")
    sample_linear(
        hidden, weight, seed=-16, step=2**64 - 1, row_offset=2**40, temperature=2, backend="triton", **every_rule
    )
    sample_linear(hidden, weight, seed=0, rows=torch.arange(rows, device=DEVICE), backend="triton")
    sample_linear(hidden, weight, seed=0, temperature=0, backend="triton")
    rows, draws = ["score_kernel", "gradient_kernel"], ["weigh_tiles_kernel", "draw_kernel"]
    assert compared == 2 * rows + 4 * draws


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("rows, width, change", [(7, 40, unaligned), (16, 16, lambda x: x), (1, 1, far)])
def test_mixing_runs_as_it_is_compiled(compared, rows, width, change, indexed):
    base, thought, features = (change(torch.randn(rows, width, device=DEVICE)).requires_grad_() for _ in range(3))
    head_weight = torch.randn(width, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    leaves = [base, thought, features, head_weight]
    index = torch.arange(rows, device=DEVICE) if indexed else None
    mixed, w = mix_hidden(*leaves, base_index=index, sigmoid=True, backend="triton")
    torch.autograd.grad(mixed.sum() + w.sum(), leaves)
    mixed, w = mix_hidden(*leaves, base_index=index, backend="triton")
    torch.autograd.grad(w.sum(), leaves[2:])
    gradients = ["mix_gradient_kernel", "base_gradient_kernel"]
    assert compared == ["mix_kernel", *gradients, "mix_kernel", "mix_gradient_kernel"]
