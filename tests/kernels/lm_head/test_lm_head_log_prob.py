"""Log-probabilities and entropy under a linear head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_watch import StorageWatch

from qstar_kernels import linear_log_prob
from qstar_kernels.lm_head import logits
from qstar_kernels.testing import assert_close

OPTIONS = [
    {},
    {"temperature": 3.0},
    {"logit_scale": 0.3},
    {"softcap": 2.0},
    {"softcap": 1.5, "temperature": 0.7, "logit_scale": 1.3},
]


def make_inputs(rows, vocabulary, width, dtype=torch.float64, seed=0, bias=True, scale=1.0):
    torch.manual_seed(seed)
    shapes = [(rows, width), (vocabulary, width)] + [(vocabulary,)] * bias
    tensors = [(scale * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes]
    return tensors, torch.randint(vocabulary, (rows,))


def run(tensors, targets, upstream, **options):
    """Results and the gradients of hidden, weight and bias."""
    hidden, weight, *bias = (tensor.detach().requires_grad_() for tensor in tensors)
    results = linear_log_prob(hidden, weight, targets, bias=bias[0] if bias else None, **options)
    results = (results,) if isinstance(results, torch.Tensor) else results
    upstream = [gradient.to(result.dtype) for gradient, result in zip(upstream, results, strict=False)]
    return *results, *torch.autograd.grad(results, (hidden, weight, *bias), upstream)


def assert_equal_to_reference(tensors, targets, upstream, **options):
    ours = run(tensors, targets, upstream, backend="torch", **options)
    wanted = run(tensors, targets, upstream, backend="reference", **options)
    for mine, reference in zip(ours, wanted, strict=True):
        error = torch.linalg.vector_norm(mine - reference)
        assert error <= 1e-12 * torch.linalg.vector_norm(reference) + 1e-15, (error, options)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", 150)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("forbidden", [None, [0, 36, 5]])
@pytest.mark.parametrize("return_entropy", [False, True])
def test_results_and_gradients_are_the_references(small_chunks, options, bias, forbidden, return_entropy):
    tensors, targets = make_inputs(63, 37, 11, bias=bias)
    if forbidden is not None:
        forbidden = torch.tensor(forbidden)
        targets[torch.isin(targets, forbidden)] = 7
    targets[::5] = -100
    upstream = torch.randn(2, 63, dtype=torch.float64)
    assert_equal_to_reference(tensors, targets, upstream, forbidden=forbidden, return_entropy=return_entropy, **options)


@given(
    rows=st.integers(0, 20),
    vocabulary=st.integers(1, 70),
    width=st.integers(1, 9),
    bias=st.booleans(),
    return_entropy=st.booleans(),
    options=st.sampled_from(OPTIONS),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_shape_equals_reference(rows, vocabulary, width, bias, return_entropy, options):
    tensors, targets = make_inputs(rows, vocabulary, width, bias=bias)
    upstream = torch.randn(2, rows, dtype=torch.float64)
    assert_equal_to_reference(tensors, targets, upstream, return_entropy=return_entropy, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("return_entropy", [False, True])
def test_lower_precisions_stay_within_the_rule(dtype, options, return_entropy):
    tensors, targets = make_inputs(111, 211, 63, dtype, scale=0.5)
    options = options | {"forbidden": torch.tensor([210, 3]), "return_entropy": return_entropy}
    targets[torch.isin(targets, options["forbidden"])] = 7
    upstream = torch.randn(2, 111)
    ours = run(tensors, targets, upstream, backend="torch", **options)
    exact = run([tensor.double() for tensor in tensors], targets, upstream, backend="reference", **options)
    for index, (mine, wanted) in enumerate(zip(ours, exact, strict=True)):
        assert_close(mine, wanted, gradient=index > return_entropy)


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_are_those_of_finite_differences(small_chunks, options):
    tensors, targets = make_inputs(5, 23, 3)
    targets[2] = -1
    options = options | {"return_entropy": True, "ignore_index": -1}

    def op(hidden, weight, bias):
        return linear_log_prob(hidden, weight, targets, bias=bias, **options)

    assert torch.autograd.gradcheck(op, tensors)


def test_error_is_no_worse_than_eager():
    tensors, targets = make_inputs(300, 5000, 64, torch.float32, bias=False)
    hidden, weight = (tensor.detach() for tensor in tensors)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    eager = (hidden @ weight.T).log_softmax(-1)
    log_prob, entropy = linear_log_prob(hidden, weight, targets, return_entropy=True)

    def rms(values, wanted):
        return (values - wanted).square().mean().sqrt().item()

    label = exact.gather(1, targets[:, None])[:, 0]
    assert rms(log_prob, label) <= 1.1 * rms(eager.gather(1, targets[:, None])[:, 0], label)
    exact_entropy = torch.special.entr(exact.exp()).sum(-1)
    assert rms(entropy, exact_entropy) <= 1.1 * rms(-(eager.exp() * eager).sum(-1), exact_entropy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_no_log_probability_is_above_0_and_no_entropy_below(dtype, scale):
    (hidden, weight), _ = make_inputs(500, 300, 32, dtype, bias=False, scale=scale)
    top = (hidden.float() @ weight.float().T).argmax(-1)
    log_prob, entropy = linear_log_prob(hidden, weight, top, return_entropy=True)
    assert log_prob.max() <= 0 and entropy.min() >= 0
    assert log_prob.isfinite().all() and entropy.isfinite().all()


def test_a_certain_row_is_exact():
    weight = torch.tensor([[1.0], [0.0], [0.0]])
    hidden = torch.tensor([[200.0]], requires_grad=True)
    log_prob, entropy = linear_log_prob(hidden, weight, torch.tensor([0]), return_entropy=True)
    (gradient,) = torch.autograd.grad(log_prob + entropy, hidden)
    assert (log_prob.item(), entropy.item(), gradient.item()) == (0.0, 0.0, 0.0)


def test_expanded_upstream_gradient_and_strided_inputs(small_chunks):
    tensors, targets = make_inputs(24, 50, 10)
    strided = [torch.stack([tensor.detach(), tensor.detach() * 7], -1)[..., 0] for tensor in tensors]
    targets = torch.stack([targets, targets], -1)[:, 0]
    assert not any(tensor.is_contiguous() for tensor in (*strided, targets))
    upstream = torch.ones(1, dtype=torch.float64).expand(24), -torch.ones(1, dtype=torch.float64).expand(24)
    assert_equal_to_reference(strided, targets, upstream, return_entropy=True)


def test_one_of_two_results_used():
    tensors, targets = make_inputs(24, 50, 10)
    for chosen in (0, 1):
        gradients = []
        for backend in ("torch", "reference"):
            results = linear_log_prob(*tensors[:2], targets, return_entropy=True, backend=backend)
            gradients.append(torch.autograd.grad(results[chosen].sum(), tensors[:2]))
        for mine, reference in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-13)


def test_ignored_rows_neither_score_nor_learn():
    (hidden, weight), targets = make_inputs(20, 30, 8, bias=False)
    targets[::2] = -100
    with torch.no_grad():
        hidden[::2] = torch.nan
    log_prob, entropy = linear_log_prob(hidden, weight, targets, return_entropy=True)
    (log_prob.sum() + entropy.sum()).backward()
    assert not log_prob[::2].any() and not entropy[::2].any() and not hidden.grad[::2].any()
    alone = weight.detach().requires_grad_()
    kept = linear_log_prob(hidden[1::2].detach(), alone, targets[1::2], return_entropy=True)
    (kept[0].sum() + kept[1].sum()).backward()
    torch.testing.assert_close(log_prob[1::2], kept[0])
    torch.testing.assert_close(weight.grad, alone.grad)


def test_ignored_target_may_be_a_token():
    (hidden, weight), targets = make_inputs(20, 5, 8, bias=False)
    log_prob = linear_log_prob(hidden, weight, targets, ignore_index=3, forbidden=torch.tensor([3]))
    assert (targets == 3).any()
    assert torch.equal(log_prob == 0, targets == 3)


def test_forbidden_columns_leave_the_normaliser(small_chunks):
    (hidden, weight, bias), targets = make_inputs(40, 30, 8)
    targets %= 20
    shortened = linear_log_prob(hidden, weight[:20], targets, bias=bias[:20], return_entropy=True)
    masked = linear_log_prob(hidden, weight, targets, bias=bias, forbidden=torch.arange(20, 30), return_entropy=True)
    for mine, wanted in zip(masked, shortened, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-13)
    gradient = torch.autograd.grad(masked[0].sum() + masked[1].sum(), weight)[0]
    assert not gradient[20:].any() and gradient[:20].any()


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_never_more_than_a_chunk_of_logits(monkeypatch, return_entropy, softcap):
    rows, vocabulary, width, chunk = 100, 512, 6, 16
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", chunk * vocabulary)
    (hidden, weight), targets = make_inputs(rows, vocabulary, width, torch.float32, bias=False)
    with StorageWatch(at_least=chunk * vocabulary * 4) as watch:
        results = linear_log_prob(hidden, weight, targets, return_entropy=return_entropy, softcap=softcap)
        sum(result.sum() for result in (results if return_entropy else [results])).backward()
    assert watch.largest == chunk * vocabulary * 4
    # The chunk itself, its probabilities besides its log-probabilities, the slope of its soft-cap.
    assert watch.most_alive <= 1 + return_entropy + (softcap is not None)


def test_nothing_is_saved_without_gradients():
    saved = []
    (hidden, weight), targets = make_inputs(20, 30, 8, bias=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape), lambda shape: None):
        linear_log_prob(hidden.detach(), weight.detach(), targets, return_entropy=True)
        assert not saved
        linear_log_prob(hidden, weight.detach(), targets)
        assert saved and (20, 30) not in saved


def test_rows_without_upstream_gradient_are_left_out_of_the_products():
    (hidden, weight), targets = make_inputs(40, 30, 8, bias=False)
    targets[:4] = -100
    upstream = torch.randn(40, dtype=torch.float64)
    upstream[2:31] = 0
    log_prob = linear_log_prob(hidden, weight, targets)
    with StorageWatch(at_least=1) as watch:
        log_prob.backward(upstream)
    assert watch.products == [(9, 8, 30), (9, 30, 8), (30, 9, 8)]


def test_autocast_has_no_effect():
    tensors, targets = make_inputs(20, 30, 8, torch.float32)
    upstream = torch.randn(2, 20)
    wanted = run(tensors, targets, upstream, return_entropy=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(tensors, targets, upstream, return_entropy=True)
    assert all(torch.equal(mine, plain) for mine, plain in zip(ours, wanted, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_bias_may_rule_a_token_out(backend):
    """As a forbidden one is: no NaN in the entropy or in any gradient."""
    tensors, targets = make_inputs(9, 13, 5, bias=True)
    targets[targets == 4] = 0
    hidden, weight, bias = (x.detach() for x in tensors)
    shut = bias.clone()
    shut[4] = -torch.inf
    results = []
    for options in ({"bias": shut}, {"bias": bias, "forbidden": torch.tensor([4])}):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        scores = linear_log_prob(*leaves, targets, **options, return_entropy=True, backend=backend)
        results.append([*scores, *torch.autograd.grad((scores[0].square() + scores[1]).sum(), leaves)])
    for mine, wanted in zip(*results, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


def test_tied_weights_add_up():
    torch.manual_seed(0)
    table = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    tokens, targets = torch.randint(30, (2, 40))
    linear_log_prob(table[tokens], table, targets).sum().backward()
    plain = table.detach().requires_grad_()
    (plain[tokens] @ plain.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    torch.testing.assert_close(table.grad, plain.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden has shape \[4\]"),
        ({"hidden": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "hidden has dtype torch.int64"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight has shape \[9, 5\]"),
        ({"weight": torch.zeros(0, 6)}, ValueError, r"weight has shape \[0, 6\].*V at least 1"),
        ({"weight": torch.zeros(9, 6).bfloat16()}, TypeError, "weight has dtype torch.bfloat16.*of torch.float32"),
        ({"bias": torch.zeros(9).half(), "product_dtype": torch.bfloat16}, TypeError, "bias has dtype torch.float16"),
        ({"product_dtype": torch.float64}, ValueError, "product_dtype is torch.float64, .* torch.float32 or"),
        ({"product_dtype": "bf16"}, ValueError, "product_dtype is 'bf16'"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \[8\], but it must be \[V\] = \[9\]"),
        ({"targets": torch.zeros(4)}, TypeError, "targets has dtype torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets has shape \[3\]"),
        ({"targets": torch.tensor([0, 9, 0, 0])}, ValueError, r"targets holds 9, .* in \[0, 9\) or -100"),
        ({"targets": torch.tensor([0, -1, 0, 0])}, ValueError, r"targets holds -1"),
        ({"targets": torch.tensor([0, 8, 0, 0])}, ValueError, "targets holds 8, .* none of the forbidden"),
        ({"forbidden": torch.tensor([9])}, ValueError, r"forbidden holds 9, but its ids must be in \[0, 9\)"),
        ({"forbidden": [9]}, TypeError, "forbidden must be a tensor"),
        (
            {"forbidden": torch.arange(9), "targets": torch.full((4,), -100)},
            ValueError,
            "forbidden holds all 9 ids",
        ),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, but it must be at least 1e-06"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0, but it must be above 0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(9, 6), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        linear_log_prob(**{**arguments, "forbidden": torch.tensor([8])} | change)
