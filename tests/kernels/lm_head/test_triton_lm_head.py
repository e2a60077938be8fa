"""The head's Triton kernels against the specification: on a GPU where there is one, else in Triton's interpreter."""

import gc
import math
from importlib import import_module

import pytest
import torch
from storage_watch import StorageWatch

from qstar_kernels import linear_log_prob, linear_log_prob_sum, mix_hidden, sample_linear
from qstar_kernels.lm_head import logits
from qstar_kernels.lm_head.logits import LogitMap
from qstar_kernels.lm_head.torch.rows import Rows as TorchRows
from qstar_kernels.testing import assert_close

pytest.importorskip("triton")
draws = import_module("qstar_kernels.lm_head.triton.draws")
rows_by_triton = import_module("qstar_kernels.lm_head.triton.rows")
launch = import_module("qstar_kernels.common.launch")
tiles = import_module("qstar_kernels.lm_head.triton.tiles")

pytestmark = pytest.mark.usefixtures("poisoned")

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROWS = 263 if ON_GPU else 7  # a GPU rounds gradients of logits to 16 bits: of a few, one rounding is the whole error
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAPS = {
    "plain": {},
    "tempered": {"temperature": 0.7, "logit_scale": 1.3},
    "soft-capped": {"softcap": 1.5, "temperature": 0.7, "logit_scale": -1.3},
}


def random(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).to(DEVICE, dtype)


def set_chunk(monkeypatch, rows, vocabulary):
    for name in ("CPU_CHUNK_ELEMENTS", "GPU_CHUNK_ELEMENTS"):
        monkeypatch.setattr(logits, name, rows * vocabulary)


def differentiate(op, tensors, upstream):
    """The results of ``op`` and the gradients of ``tensors``."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    results = op(*leaves)
    upstream = [x.to(result).expand(result.shape) for x, result in zip(upstream, results, strict=False)]
    return *results, *torch.autograd.grad(results, leaves, upstream)


def assert_equal_to_reference(op, tensors, upstream):
    """``op(backend)`` maps tensors to results."""
    ours = differentiate(op("triton"), tensors, upstream)
    wanted = differentiate(op("reference"), [tensor.double() for tensor in tensors], upstream)
    results = len(ours) - len(tensors)
    for index, (mine, exact) in enumerate(zip(ours, wanted, strict=True)):
        assert_close(mine, exact, gradient=index >= results, name=f"result {index}")


def mixing(base_index, sigmoid):
    def op(backend):
        return lambda *tensors: mix_hidden(*tensors, base_index=base_index, sigmoid=sigmoid, backend=backend)

    return op


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("indexed", "sigmoid"), [(True, True), (True, False), (False, False)])
def test_mix_equals_reference(dtype, indexed, sigmoid):
    torch.manual_seed(0)
    rows, width = 17, 40
    base_index = torch.randint(1, 6, (rows,), device=DEVICE) if indexed else None  # rows 0 and 6 are nobody's
    tensors = [random(7 if indexed else rows, width, dtype=dtype), *random(2, rows, width, dtype=dtype)]
    tensors.append(random(width, dtype=dtype, scale=0.3))
    assert_equal_to_reference(mixing(base_index, sigmoid), tensors, (random(rows, width, dtype=dtype), random(rows)))


def test_mix_of_any_strides_and_precisions():
    torch.manual_seed(0)
    base_index = torch.tensor([1, 9, 2, 9, 0, 9, 1, 9], device=DEVICE)[::2]
    assert not base_index.is_contiguous()
    base, thought = random(33, 3).T, random(4, 66, dtype=torch.float32)[:, ::2]
    features, head_weight = random(4, 1, dtype=torch.bfloat16).expand(4, 33), random(66)[::2]
    assert_equal_to_reference(mixing(base_index, True), [base, thought, features, head_weight], random(2, 1).unbind())


def test_mix_gradient_through_one_result_only():
    torch.manual_seed(0)
    base_index = torch.tensor([1, 1, 0], device=DEVICE)
    tensors = [random(2, 33), *random(2, 3, 33), random(33)]
    for chosen in (0, 1):
        gradients = []
        for backend in ("triton", "torch"):
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            result = mixing(base_index, False)(backend)(*leaves)[chosen]
            gradients.append(torch.autograd.grad(result.sum(), leaves, allow_unused=True, materialize_grads=True))
        for mine, other in zip(*gradients, strict=True):
            assert_close(mine, other.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_zero_gives_the_base_bit_for_bit(dtype):
    torch.manual_seed(0)
    base, thought, features = random(3, 35, dtype=dtype), *random(2, 5, 35, dtype=dtype)
    base[0, :8], thought[0, 0], thought[1, 1] = -0.0, torch.inf, torch.nan
    base_index = torch.tensor([0, 2, 1, 1, 0], device=DEVICE)
    mixed, w = mix_hidden(base, thought, features, torch.zeros_like(base[0]), base_index=base_index, backend="triton")
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    assert torch.equal(mixed.view(bits), base[base_index].view(bits)) and not w.any()


def scoring(targets, **options):
    """An op from (hidden, weight) or (hidden, weight, bias)."""

    def op(backend):
        def call(hidden, weight, bias=None):
            extra = {} if bias is None else {"bias": bias}
            results = linear_log_prob(hidden, weight, targets, backend=backend, **extra, **options)
            return results if isinstance(results, tuple) else (results,)

        return call

    return op


def head_inputs(rows, vocabulary, width, dtype=torch.float32, bias=True):
    torch.manual_seed(rows)
    shapes = [(rows, width), (vocabulary, width)] + [(vocabulary,)] * bias
    targets = torch.randint(1, 5, (rows,), device=DEVICE)
    return [random(*shape, dtype=dtype, scale=0.5) for shape in shapes], targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("return_entropy", [False, True], ids=["", "entropy"])
def test_log_prob_equals_reference(monkeypatch, dtype, options, return_entropy):
    set_chunk(monkeypatch, 3, 300)
    tensors, _ = head_inputs(ROWS, 300, 24, dtype)
    targets = torch.randint(6, 60, (ROWS,), device=DEVICE)
    targets[2] = -100
    forbidden = torch.tensor([0, 299, 5, *range(60, 260)], device=DEVICE)
    upstream = random(2, ROWS)
    upstream[:, 4] = 0
    op = scoring(targets, forbidden=forbidden, return_entropy=return_entropy, **options)
    assert_equal_to_reference(op, tensors, upstream)


@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(0, 100, 16), (1, 1, 3), (37, 7, 16), (3, 131, 40)])
def test_log_prob_of_any_shape(rows, vocabulary, width):
    tensors, targets = head_inputs(rows, vocabulary, width, bias=False)
    targets %= vocabulary
    assert_equal_to_reference(scoring(targets, return_entropy=True), tensors, random(2, rows))


def test_log_prob_of_any_strides():
    tensors, targets = head_inputs(4, 100, 16)
    strided = [torch.stack([tensor, tensor * 7], -1)[..., 0] for tensor in tensors]
    targets = torch.stack([targets, targets], -1)[:, 0]
    assert not any(x.is_contiguous() for x in (*strided, targets))
    assert_equal_to_reference(scoring(targets, return_entropy=True), strided, (torch.ones(1), -torch.ones(1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
def test_gradients_take_the_place_of_the_logits(dtype, options):
    """Of every precision: a CPU's factors are always float32."""
    vocabulary, rows = 300, 4
    logit_map = LogitMap(*(options.get(name, other) for name, other in (("temperature", 1.0), ("logit_scale", 1.0))),
                         options.get("softcap"))  # fmt: skip
    torch.manual_seed(0)
    weight, bias = random(vocabulary, 1, dtype=dtype), random(vocabulary, dtype=dtype)
    forbidden = torch.tensor([0, 299, *range(70, 140)], device=DEVICE)
    head = rows_by_triton.Rows(weight, bias, forbidden, logit_map)
    y = torch.full((rows, 304), torch.nan, device=DEVICE)
    product = random(rows, vocabulary)
    y[:, :vocabulary] = product.index_fill(1, forbidden, -torch.inf)
    targets = torch.tensor([298, 1, 64, 200], device=DEVICE)
    d_log_prob, d_entropy = random(2, rows)
    log_prob, entropy = head.score(y, targets, True)
    again = torch.empty_like(log_prob)
    d_logits = head.gradient(y, targets, d_log_prob, d_entropy, entropy, again, dtype)
    assert d_logits.dtype == dtype and d_logits.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()

    plain = TorchRows(torch.eye(vocabulary, dtype=torch.float64, device=DEVICE), bias.double(), forbidden, logit_map)
    z = plain.multiply((product.double(),), torch.empty(rows, vocabulary, dtype=torch.float64, device=DEVICE))
    exact, exact_entropy = plain.score(z.clone(), targets, True)
    assert_close(log_prob, exact)
    assert_close(again, exact)
    assert_close(entropy, exact_entropy)
    upstream = (d_log_prob.double(), d_entropy.double(), exact_entropy, None)
    assert_close(d_logits, plain.gradient(z, targets, *upstream, torch.float64), gradient=True)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_no_log_probability_is_above_0_and_no_entropy_below(scale):
    tensors, _ = head_inputs(9, 300, 16, bias=False)
    hidden, weight = tensors[0] * scale, tensors[1]
    top = (hidden @ weight.T).argmax(-1)
    log_prob, entropy = linear_log_prob(hidden, weight, top, return_entropy=True, backend="triton")
    assert log_prob.max() <= 0 and entropy.min() >= 0
    assert log_prob.isfinite().all() and entropy.isfinite().all()


def test_a_certain_row_is_exact():
    weight = torch.zeros(200, 1, device=DEVICE)
    weight[3] = 1.0
    hidden, target = torch.tensor([[200.0]], device=DEVICE, requires_grad=True), torch.tensor([3], device=DEVICE)
    log_prob, entropy = linear_log_prob(hidden, weight, target, return_entropy=True, backend="triton")
    (gradient,) = torch.autograd.grad(log_prob + entropy, hidden)
    assert (log_prob.item(), entropy.item(), gradient.item()) == (0.0, 0.0, 0.0)


def test_a_nan_is_not_hidden():
    tensors, targets = head_inputs(2, 140, 16, bias=False)
    tensors[0][0, 0] = torch.nan
    log_prob, entropy = linear_log_prob(*tensors, targets, return_entropy=True, backend="triton")
    drawn = sample_linear(*tensors, seed=0, backend="triton")
    assert drawn[0].min() >= 0 and drawn[0].max() < 140
    for result in (log_prob, entropy, drawn[1]):
        assert result.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_equals_two(monkeypatch, dtype):
    set_chunk(monkeypatch, 4, 131)
    tensors, _ = head_inputs(ROWS, 131, 16, dtype)
    targets = torch.randint(8, 130, (ROWS,), device=DEVICE)
    targets[1] = -100
    row_weight = random(ROWS)
    row_weight[3] = 0
    options = {"softcap": 2.0, "forbidden": torch.tensor([7, 130], device=DEVICE)}

    def op(backend):
        def call(hidden, weight, bias):
            given = row_weight.to(torch.promote_types(hidden.dtype, torch.float32))
            return linear_log_prob_sum(hidden, weight, targets, given, bias=bias, backend=backend, **options)[:1]

        return call

    assert_equal_to_reference(op, tensors, (torch.tensor(0.7),))
    with torch.no_grad():
        total, log_prob = linear_log_prob_sum(*tensors[:2], targets, row_weight, backend="triton")
    assert torch.equal(log_prob, scoring(targets)("triton")(*tensors[:2])[0])
    torch.testing.assert_close(total, (log_prob * row_weight).sum())


@pytest.fixture
def collected(monkeypatch):
    """The interpreter leaves what a kernel was given in reference cycles."""
    run_all = launch.run_all

    def run_and_collect(*arguments):
        run_all(*arguments)
        gc.collect()

    for module in (rows_by_triton, draws):
        monkeypatch.setattr(module, "run_all", run_and_collect)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 20])
@pytest.mark.parametrize("op", ["two passes", "one pass", "draws"])
def test_one_chunk_of_logits_whatever_the_number_of_rows(monkeypatch, collected, rows, op):
    vocabulary, chunk = 256, 6
    set_chunk(monkeypatch, chunk, vocabulary)
    tensors, targets = head_inputs(rows, vocabulary, 3, bias=False)
    hidden, weight = (tensor.requires_grad_() for tensor in tensors)
    size = chunk * vocabulary * 4
    with StorageWatch(at_least=size // 2 + 1) as watch:
        if op == "two passes":
            scores = linear_log_prob(hidden, weight, targets, return_entropy=True, backend="triton")
            sum(x.sum() for x in scores).backward()
        elif op == "one pass":
            linear_log_prob_sum(hidden, weight, targets, random(rows), backend="triton")[0].backward()
        else:
            sample_linear(hidden, weight, seed=0, temperature=0.5, backend="triton")
    assert (watch.largest, watch.most_alive) == (size, 1)


DRAWS = {
    "plain": {},
    "greedy": {"temperature": 0.0, "softcap": 2.0, "log_prob_temperature": 0.7},
    "two temperatures": {"temperature": 0.5, "log_prob_temperature": 3.0, "seed": -7, "step": 2**63 + 5},
    "all rules": {"softcap": 1.5, "logit_scale": 1.3, "forbidden": [0, 299, *range(120, 260)], "row_offset": 2**40},
}


@pytest.mark.parametrize("options", DRAWS.values(), ids=DRAWS)
def test_draws_are_those_of_the_other_backends(options):
    tensors, _ = head_inputs(37, 300, 16)
    options = {"seed": 5, "bias": tensors.pop()} | options
    if "forbidden" in options:
        options["forbidden"] = torch.tensor(options["forbidden"], device=DEVICE)
    tokens, log_prob = sample_linear(*tensors, backend="triton", **options)
    assert torch.equal(tokens, sample_linear(*tensors, backend="torch", **options)[0])
    options["bias"] = options["bias"].double()
    wanted = sample_linear(*(tensor.double() for tensor in tensors), backend="reference", **options)
    assert torch.equal(tokens, wanted[0])
    assert_close(log_prob, wanted[1])


@pytest.mark.parametrize(("seed", "step"), [(-7, 2**63 + 5), (2**64 - 1, 2**32 + 1), (2**31 - 1, 0)])
def test_draws_of_a_seed_and_a_step_on_the_device(seed, step):
    """Bit for bit those of integers, which the kernel takes in 32 bits where they fit."""
    tensors, _ = head_inputs(9, 300, 16, bias=False)
    on_device = {
        name: torch.tensor(draws.signed(value), device=DEVICE) for name, value in (("seed", seed), ("step", step))
    }
    for options in ({}, {"temperature": 0.6}, {"temperature": 0.0}):
        wanted = sample_linear(*tensors, seed=seed, step=step, backend="triton", **options)
        for given in (on_device, {"seed": seed, "step": on_device["step"]}):
            drawn = sample_linear(*tensors, **given, backend="triton", **options)
            assert all(torch.equal(mine, other) for mine, other in zip(drawn, wanted, strict=True))
    narrow = torch.tensor(-7, dtype=torch.int32, device=DEVICE), torch.tensor(3, dtype=torch.int32, device=DEVICE)
    wanted = sample_linear(*tensors, seed=-7, step=3, backend="triton")
    drawn = sample_linear(*tensors, seed=narrow[0], step=narrow[1], backend="triton")
    assert torch.equal(drawn[0], wanted[0])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_in_memory_number_the_draws(monkeypatch, temperature):
    """Across chunks and with any strides; all 64 bits count."""
    set_chunk(monkeypatch, 5, 300)
    hidden, weight = (torch.randint(-2, 3, shape, device=DEVICE).float() for shape in ((12, 4), (300, 4)))
    options = {"seed": 3, "step": 4, "temperature": temperature, "backend": "triton"}
    first = 2**33 - 5
    wanted = sample_linear(hidden, weight, row_offset=first, **options)
    rows = torch.arange(12, device=DEVICE) + first
    for numbers in (rows, torch.stack([rows, rows + 1], 1)[:, 0]):
        drawn = sample_linear(hidden, weight, rows=numbers, **options)
        assert all(torch.equal(mine, other) for mine, other in zip(drawn, wanted, strict=True))
    order = torch.randperm(12, device=DEVICE)
    drawn = sample_linear(hidden[order], weight, rows=rows[order], **options)
    assert all(torch.equal(mine, other[order]) for mine, other in zip(drawn, wanted, strict=True))
    options |= {"rows": torch.arange(12, device=DEVICE) * 2**60 - 2**63}
    drawn = sample_linear(hidden, weight, **options)
    assert torch.equal(drawn[0], sample_linear(hidden, weight, **options | {"backend": "torch"})[0])


def test_the_arg_max_is_the_lowest_id_among_equals():
    hidden, weight = torch.ones(1, 1, device=DEVICE), torch.zeros(400, 1, device=DEVICE)
    weight[[131, 140, 300, 390]] = 1.0
    assert sample_linear(hidden, weight, seed=0, temperature=0.0, backend="triton")[0].item() == 131


def test_draws_do_not_depend_on_chunks_tiles_or_processes(monkeypatch):
    torch.manual_seed(0)  # small integers, so that products are exact whatever the order of addition
    hidden, weight = (torch.randint(-2, 3, shape, device=DEVICE).float() for shape in ((12, 4), (600, 4)))
    options = {"seed": 3, "step": 4, "temperature": 0.7, "backend": "triton"}
    first_row = 2**33 - 5
    whole = sample_linear(hidden, weight, row_offset=first_row, **options)
    set_chunk(monkeypatch, 5, 600)
    tile = launch.Tile(1, 512 if ON_GPU else 1024, 4, 1)
    with tiles.TABLE.trying("weigh_tiles", tile), tiles.TABLE.trying("draw", tile):
        parts = [
            sample_linear(hidden[:7], weight, row_offset=first_row, **options),
            sample_linear(hidden[7:], weight, row_offset=first_row + 7, **options),
        ]
    for one, several in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(several))


def test_draws_have_the_head_s_distribution():
    rows, z = 120, torch.tensor([0.3, -0.5, 1.0, 0.0, 0.6], device=DEVICE)
    drawn = sample_linear(torch.ones(rows, 1, device=DEVICE), z[:, None], seed=11, backend="triton")[0]
    wanted = z.double().softmax(-1) * rows
    chi_square = ((drawn.bincount(minlength=5) - wanted).square() / wanted).sum().item()
    assert chi_square < 18.5  # exceeded once in a thousand


def test_a_tail_of_small_probabilities_gets_its_mass():
    z = torch.cat([torch.zeros(1), torch.linspace(-12, -18, 100_000)]).to(DEVICE)
    rows = 2000 if ON_GPU else 120
    wide = launch.Tile(1, 4096 if ON_GPU else 131_072, 8, 1), launch.Tile(1, 512 if ON_GPU else 1024, 4, 1)
    with tiles.TABLE.trying("weigh_tiles", wide[0]), tiles.TABLE.trying("draw", wide[1]):
        tokens, log_prob = sample_linear(torch.ones(rows, 1, device=DEVICE), z[:, None], seed=5, backend="triton")
    log_p = z.double().log_softmax(-1)
    assert_close(log_prob, log_p[tokens])
    mass = log_p[1:].exp().sum().item()
    assert mass > 0.09 and abs((tokens > 0).double().mean().item() - mass) < 3 * math.sqrt(mass * (1 - mass) / rows)


def test_unsupported_tensors_are_refused():
    hidden, weight = random(3, 4, dtype=torch.float64), random(5, 4, dtype=torch.float64)
    targets = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    calls = [
        lambda **options: linear_log_prob(hidden, weight, targets, **options),
        lambda **options: linear_log_prob_sum(hidden, weight, targets, hidden[:, 0], **options),
        lambda **options: sample_linear(hidden, weight, seed=0, **options),
        lambda **options: mix_hidden(hidden, hidden, hidden, weight[0], **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"backend is 'triton'.*float64"):
            call(backend="triton")
        call(backend="auto")
