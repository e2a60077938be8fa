"""Float32 products on a CPU by either library: values, gradients, and what keeps to PyTorch's own choice."""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qstar_kernels
from qstar_kernels import (
    cpu_products,
    current_cpu_products,
    faster_linear,
    linear,
    linear_log_prob,
    linear_log_prob_sum,
    products,
    sample_linear,
)
from qstar_kernels.testing import assert_close

pytestmark = [
    pytest.mark.skipif(products.find_refusal() is not None, reason="this PyTorch cannot call oneDNN"),
    pytest.mark.usefixtures("by_onednn"),
]

SHAPES = [  # of x, and n
    ((64, 256), 256),
    ((2051, 64), 32),
    ((100, 300), 257),
    ((3, 7, 100, 63), 128),
    ((9000, 8), 64),
    ((9000, 64), 8),
    ((8, 1024), 512),
]


def case(shape, n, *, bias=True, seed=0):
    """x, weight and bias that require gradients, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, shift = (torch.randn(size, generator=generator) for size in (shape, (n, shape[-1]), (n,)))
    d_out = torch.randn(*shape[:-1], n, generator=generator)
    return [each.requires_grad_() for each in ((x, weight, shift) if bias else (x, weight))], d_out


def assert_exact(leaves, d_out, run):
    """Hold what ``run`` makes of ``leaves``, and the gradients, to float64."""
    wide = [each.detach().double().requires_grad_() for each in leaves]
    out, expected = run(*leaves), F.linear(*wide)
    assert_close(out, expected, name="out")
    wanted = [each for each in leaves if each.requires_grad]
    gradients = torch.autograd.grad(out, wanted, d_out)
    exact = torch.autograd.grad(expected, wide, d_out.double())
    exact = [each for each, leaf in zip(exact, leaves, strict=True) if leaf.requires_grad]
    for place, (gradient, right) in enumerate(zip(gradients, exact, strict=True)):
        assert_close(gradient, right, gradient=True, name=f"gradient {place}")


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("shape", "n"), SHAPES, ids=str)
def test_values_and_gradients_are_those_of_float64(calls, shape, n, bias):
    leaves, d_out = case(shape, n, bias=bias)
    assert_exact(leaves, d_out, linear)
    rows = d_out.numel() // n
    assert calls[:2] == [(rows, shape[-1], n), (rows, n, shape[-1])]
    assert set(calls[2:]) <= {(n, rows, shape[-1]), (shape[-1], rows, n)} and len(calls) >= 3


@pytest.mark.parametrize("learned", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_what_is_frozen_has_no_gradient_and_is_not_kept(calls, learned):
    """As beside adapters, whose base keeps no activations for gradients that nobody wants."""
    leaves, d_out = case((64, 256), 256)
    for leaf, wanted in zip(leaves, learned, strict=True):
        leaf.requires_grad_(wanted)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = linear(*leaves)
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x, y in zip(leaves[:2], (1, 0), strict=True) if learned[y]]
    out.backward(d_out)
    assert [leaf.grad is not None for leaf in leaves] == list(learned)
    assert len(calls) == 1 + learned[0] + learned[1]


class SecondFactors(TorchDispatchMode):
    """Whether those that oneDNN is given are dense, as they are or transposed."""

    def __init__(self):
        super().__init__()
        self.dense = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.mkldnn._linear_pointwise.default:
            self.dense.append(args[1].is_contiguous() or args[1].t().is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stride", [0, 2])
def test_a_bias_of_any_stride(calls, stride):
    leaves, d_out = case((192, 192), 192)
    leaves[2] = torch.as_strided(torch.randn(2 * 192), (192,), (stride,)).requires_grad_()
    assert_exact(leaves, d_out, linear)
    assert len(calls) >= 3


def test_a_product_of_nothing_is_the_bias():
    x, weight, bias = torch.randn(3, 0), torch.randn(4, 0), torch.randn(4)
    assert torch.equal(linear(x, weight, bias, backend="onednn"), bias.expand(3, 4))


@pytest.mark.parametrize("view", ["wider", "every other", "transposed", "transposed of wider", "expanded"])
@pytest.mark.parametrize("which", ["x", "weight", "d_out"])
def test_factors_of_any_strides(calls, which, view):
    """Those that oneDNN itself would take a thousand times as long for are copied first."""
    leaves, d_out = case((192, 192), 192)

    def strided(x):
        wide = torch.cat([x, x], 1)
        return {
            "wider": lambda: wide[:, : x.shape[1]],
            "every other": lambda: x.repeat_interleave(2, 1)[:, ::2],
            "transposed": lambda: x.t().contiguous().t(),
            "transposed of wider": lambda: torch.cat([x.t(), x.t()], 1)[:, : len(x)].t(),
            "expanded": lambda: x[:1].expand_as(x),
        }[view]().detach()

    if which == "d_out":
        d_out = strided(d_out)
    else:
        place = ("x", "weight").index(which)
        leaves[place] = strided(leaves[place]).requires_grad_()
    with SecondFactors() as given:
        assert_exact(leaves, d_out, linear)
    assert len(calls) >= 3 and len(given.dense) == 3 and all(given.dense)


def test_rows_have_the_same_bits_among_more_and_fewer_others_and_on_any_number_of_threads():
    (x, weight, bias), _ = case((1000, 256), 320)
    whole = linear(x, weight, bias)
    for rows in (64, 100, 511):
        assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])
    torch.set_num_threads(2)
    assert torch.equal(linear(x, weight, bias), whole)


def test_a_second_derivative_is_that_of_torch():
    leaves, _ = case((64, 256), 256)

    def second(run):
        out = run(*leaves)
        (gradient,) = torch.autograd.grad(out.square().sum() / 1e3, leaves[0], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaves[:2])

    for ours, theirs in zip(second(linear), second(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_results_can_be_written_to_in_place():
    """Also those of three dimensions, which oneDNN's operator returns as views."""
    leaves, d_out = case((4, 32, 256), 256)
    out = linear(*leaves)
    out.mul_(2.0)
    out.backward(d_out)
    torch.testing.assert_close(leaves[2].grad, 2 * d_out.sum((0, 1)))


@pytest.mark.parametrize(
    ("rows", "k", "n", "taken"),
    [(64, 256, 256, True), (63, 256, 256, False), (8, 1024, 512, True), (7, 1024, 1024, False), (9000, 512, 7, False)],
)
def test_only_large_products_go_to_onednn(calls, rows, k, n, taken):
    leaves, _ = case((rows, k), n)
    with torch.no_grad():
        ours = linear(*leaves)
    assert bool(calls) == taken
    assert taken or torch.equal(ours, F.linear(*leaves))


def test_no_rows_and_no_columns_are_no_products(calls):
    for shape, n in (((0, 256), 256), ((3, 0, 256), 256), ((5, 0), 4)):
        leaves, d_out = case(shape, n)
        with faster_linear(leaves[0]):
            out = F.linear(*leaves)
        out.backward(d_out)
        assert torch.equal(out, F.linear(*leaves)) and not calls


def test_a_named_backend_is_what_runs_or_says_why_not(calls):
    (x, weight, bias), _ = case((3, 16), 5)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for backend in ("reference", "torch", "onednn"):
        assert_close(linear(x, weight, bias, backend=backend), exact, name=backend)
        assert len(calls) == (backend == "onednn")
    with pytest.raises(ValueError, match=r"^backend is 'mkl', but it must be one of 'auto', 'reference'"):
        linear(x, weight, bias, backend="mkl")
    with pytest.raises(ValueError, match=r"^backend is 'onednn', but it cannot run: it takes float32 tensors"):
        linear(x.double(), weight.double(), backend="onednn")
    with pytest.raises(ValueError, match=r"^x and weight have shapes \[3, 16\] and \[5, 15\], but they must be"):
        linear(x, weight[:, 1:], backend="onednn")


def test_the_library_is_a_setting_of_this_thread_and_says_what_it_may_be():
    with pytest.raises(ValueError, match="library is 'mkl', but it must be one of 'auto', 'torch', 'onednn'"):
        cpu_products("mkl").__enter__()
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(current_cpu_products()))
    thread.start()
    thread.join()
    assert (current_cpu_products(), *elsewhere) == ("onednn", "auto")


def test_a_torch_without_the_operator_keeps_to_its_own(monkeypatch, calls):
    (x, weight, bias), _ = case((64, 256), 256)
    monkeypatch.setattr(products, "PRIVATE", ((torch.ops.mkldnn, "_linear_gone"),))
    refusal = f"PyTorch {torch.__version__} has no _linear_gone"
    assert products.automatic.__wrapped__() == ("torch", refusal)
    monkeypatch.setattr(products, "automatic", products.automatic.__wrapped__)
    with pytest.raises(ValueError, match=r"library is 'onednn', but it cannot run: PyTorch .* has no _linear_gone"):
        cpu_products("onednn").__enter__()
    with cpu_products("auto"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias)) and not calls


@pytest.mark.parametrize(
    ("processor", "avx512", "family", "mkl", "chosen"),
    [
        ("AMD EPYC", True, 26, True, "onednn"),
        ("AMD Ryzen 9 9950X", True, 27, True, "onednn"),
        ("AMD EPYC", True, 25, True, "torch"),
        ("AMD EPYC", True, None, True, "torch"),
        ("AMD EPYC", True, 26, False, "torch"),
        ("AMD EPYC 7763", False, 25, True, "torch"),
        ("Intel Xeon Platinum 8488C", True, 6, True, "torch"),
        (None, None, None, True, "torch"),
    ],
)
def test_only_machines_that_were_measured_change_the_library(monkeypatch, processor, avx512, family, mkl, chosen):
    found = {} if processor is None else {"cpu_name": processor, "avx512_f": avx512}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(products, "processor_family", lambda: family)
    library = products.automatic.__wrapped__()
    assert library.name == chosen and (not mkl or (processor or "an unknown processor") in library.reason)


@pytest.mark.parametrize(
    ("linux", "windows", "family"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", "", 26),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", "", None),
        (None, "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", 25),
        (None, "", None),
    ],
)
def test_the_family_of_a_processor_is_read_where_systems_tell_it(monkeypatch, tmp_path, linux, windows, family):
    told = tmp_path / "cpuinfo"
    if linux is not None:
        told.write_text(linux)
    monkeypatch.setattr(products, "Path", lambda path: told)
    monkeypatch.setattr(products.platform, "processor", lambda: windows)
    assert products.processor_family() == family


def test_what_is_explained_is_what_runs(calls):
    (x, weight, bias), _ = case((64, 256), 256)
    for library in ("auto", "torch", "onednn"):
        with cpu_products(library):
            explained = {each.op: each for each in qstar_kernels.explain("cpu")}["linear"]
            calls.clear()
            linear(x, weight, bias)
        assert explained.backend == ("onednn" if calls else "torch")
        assert library == "auto" or explained.reason == f"cpu_products({library!r}) is in force"
    assert {each.op: each.backend for each in qstar_kernels.explain("cpu", torch.float64)}["linear"] == "torch"


def head_case(dtype):
    """Rows, a vocabulary's weight and bias that require gradients, targets, weights of rows, and options."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(size, generator=generator) / 3 for size in ((90, 64), (1001, 64), (1001,)))
    targets = torch.randint(2, 1001, (90,), generator=generator)
    targets[::7] = -100
    row_weight = torch.rand(90, generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    options = dict(temperature=0.7, logit_scale=1.3, softcap=20.0, forbidden=torch.tensor([0, 1]))
    return leaves, targets, row_weight.to(dtype), options


def head_results(dtype, op, bias):
    """What ``op`` makes of :func:`head_case`, and the gradients; the backward runs in no context."""
    (hidden, weight, shift), targets, row_weight, options = head_case(dtype)
    leaves = [hidden, weight, shift][: 2 + bias]
    options |= dict(bias=shift) if bias else {}
    if op is linear_log_prob:
        results = op(hidden, weight, targets, return_entropy=True, **options)
        total = (results[0] * row_weight).sum() + results[1].sum()
    else:
        results = op(hidden, weight, targets, row_weight, **options)
        total = results[0]
    with cpu_products("torch"):
        return [x.detach() for x in results] + list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("op", [linear_log_prob, linear_log_prob_sum])
def test_the_vocabulary_head_multiplies_by_the_same_library_in_both_directions(calls, op, bias):
    exact = head_results(torch.float64, op, bias)
    assert not calls
    ours = head_results(torch.float32, op, bias)
    rows = 90 - len(range(0, 90, 7))
    one_way = [(rows, 64, 1001)]
    both_ways = [(rows, 64, 1001), (rows, 1001, 64), (1001, rows, 64), (64, rows, 1001)]
    assert calls == (one_way if op is linear_log_prob else []) + both_ways
    for place, (x, right) in enumerate(zip(ours, exact, strict=True)):
        assert_close(x, right, gradient=place > 1, name=f"result {place}")
    with cpu_products("torch"):
        calls.clear()
        head_results(torch.float32, op, bias)
        assert not calls


def test_states_of_16_bits_meet_the_head_in_float32_and_have_gradients_of_16_bits(calls):
    (hidden, weight, _), targets, _, options = head_case(torch.bfloat16)
    (gradient,) = torch.autograd.grad(linear_log_prob(hidden, weight, targets, **options).sum(), hidden)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (exact,) = torch.autograd.grad(linear_log_prob(*wide, targets, **options).sum(), wide[0])
    assert len(calls) >= 3 and gradient.dtype == torch.bfloat16
    assert_close(gradient, exact, gradient=True)


def test_draws_are_those_of_float64_but_for_roundings(calls):
    (hidden, weight, bias), _, _, options = head_case(torch.float32)
    draw = partial(sample_linear, seed=3, **options)
    tokens, log_prob = draw(hidden, weight, bias=bias)
    assert calls == [(90, 64, 1001)]
    exact, exact_log_prob = draw(hidden.double(), weight.double(), bias=bias.double())
    assert torch.equal(tokens, exact)
    assert_close(log_prob, exact_log_prob)
