"""Sampling from a linear head."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_watch import StorageWatch
from wait_watch import WaitWatch

from qstar_kernels import sample_linear
from qstar_kernels.common.random_bits import row_uniforms
from qstar_kernels.lm_head import logits
from qstar_kernels.lm_head.torch import draws
from qstar_kernels.testing import assert_close

OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5, "log_prob_temperature": 3.0},
    {"temperature": 2.0, "log_prob_temperature": 2.0, "logit_scale": 0.3},
    {"temperature": 0.0, "softcap": 2.0, "log_prob_temperature": 0.7},
    {"softcap": 1.5, "logit_scale": 1.3},
]


def make_inputs(rows, vocabulary, width, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in ((rows, width), (vocabulary, width))]


def make_exact_inputs(rows, vocabulary):
    """Small integers: every product and sum is exact, whatever the order in which a library adds."""
    torch.manual_seed(0)
    return [torch.randint(-3, 4, shape).float() for shape in ((rows, 8), (vocabulary, 8))]


def draw_many(z, rows, **options):
    """Tokens drawn for ``rows`` rows that all have the logits ``z``."""
    return sample_linear(torch.ones(rows, 1), z.float()[:, None], **options)[0]


def test_the_largest_uniform_still_draws_a_token():
    largest = torch.tensor([1 - 2.0**-53], dtype=torch.float64)
    for seed in range(200):
        mass = torch.rand(1, 1000, generator=torch.Generator().manual_seed(seed))
        mass[:, 900:] = 0
        assert draws.pick(mass, largest).item() == 899
        assert draws.pick(mass.flip(1), torch.zeros(1, dtype=torch.float64)).item() == 100


def test_a_ladder_of_uniforms_gives_every_token_its_share():
    """Stratified uniforms instead of random ones: no sampling error, so the shares have to be right to one draw."""
    torch.manual_seed(0)
    p = torch.randn(1, 512).mul_(3).softmax(-1)
    rungs = 400
    ladder = (torch.arange(rungs, dtype=torch.float64) + 0.5) / rungs
    tiles = draws.draw_columns(p.expand(rungs, -1).contiguous(), ladder, ladder)[:, 0] // draws.TILE
    share = p.view(4, draws.TILE).sum(-1)
    assert (tiles.bincount(minlength=4) - rungs * share).abs().max() <= 1
    for tile, tile_uniform in enumerate((share.cumsum(0) - share / 2).tolist()):
        drawn = draws.draw_columns(p.expand(rungs, -1).contiguous(), torch.full_like(ladder, tile_uniform), ladder)[
            :, 0
        ]
        assert (drawn // draws.TILE == tile).all()
        columns = p[0, tile * draws.TILE : (tile + 1) * draws.TILE] / share[tile]
        assert ((drawn % draws.TILE).bincount(minlength=draws.TILE) - rungs * columns).abs().max() <= 1


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_have_the_head_s_distribution(temperature):
    torch.manual_seed(0)
    z = torch.randn(300)
    rows = 60_000
    wanted = (z.double() / temperature).softmax(-1) * rows
    drawn = draw_many(z, rows, seed=11, temperature=temperature).bincount(minlength=300)
    head = wanted >= 10
    freedom = head.sum().item() - 1
    assert freedom > 100
    chi_square = ((drawn - wanted).square() / wanted)[head].sum().item()
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_a_tail_of_small_probabilities_gets_its_mass():
    tail = torch.linspace(-12, -18, 100_000)
    z = torch.cat([torch.zeros(1), tail])
    rows = 5000
    mass = z.double().softmax(-1)[1:].sum().item()
    drawn = (draw_many(z, rows, seed=5) > 0).double().mean().item()
    standard_error = math.sqrt(mass * (1 - mass) / rows)
    assert mass > 0.09 and abs(drawn - mass) < 3 * standard_error


def test_a_tail_18_below_the_top_reaches_its_share_without_sampling_error():
    z = torch.cat([torch.zeros(1), torch.full((128_000 - 1,), -18.0)])
    p = torch.softmax(z[None], -1)
    rungs = 2000
    ladder = (torch.arange(rungs, dtype=torch.float64) + 0.5) / rungs
    up_to_tile = p.view(1, -1, draws.TILE).sum(-1)
    tile = draws.pick(up_to_tile.expand(rungs, -1), ladder)
    share = z.double().softmax(-1)[draws.TILE :].sum() * rungs
    assert abs((tile > 0).sum() - share) <= 1


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("forbidden", [None, [0, 255, 40]])
def test_tokens_and_log_probabilities_are_the_references(monkeypatch, options, forbidden):
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", 5000)
    hidden, weight = make_inputs(211, 300, 9)
    options = options | {"bias": torch.randn(300, dtype=torch.float64), "seed": -5, "step": 3, "row_offset": 2**40}
    options["forbidden"] = None if forbidden is None else torch.tensor(forbidden)
    tokens, log_prob = sample_linear(hidden, weight, **options)
    wanted_tokens, wanted_log_prob = sample_linear(hidden, weight, backend="reference", **options)
    assert torch.equal(tokens, wanted_tokens)
    torch.testing.assert_close(log_prob, wanted_log_prob, rtol=1e-12, atol=1e-14)
    assert forbidden is None or not torch.isin(tokens, options["forbidden"]).any()


@given(
    rows=st.integers(0, 20),
    vocabulary=st.integers(1, 400),
    seed=st.integers(-(2**63), 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    options=st.sampled_from(OPTIONS),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_any_shape_and_seed_equal_reference(rows, vocabulary, seed, step, options):
    hidden, weight = make_inputs(rows, vocabulary, 5)
    tokens, log_prob = sample_linear(hidden, weight, seed=seed, step=step, **options)
    wanted = sample_linear(hidden, weight, seed=seed, step=step, backend="reference", **options)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, wanted[0])
    torch.testing.assert_close(log_prob, wanted[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_log_probabilities_of_lower_precisions(dtype, options):
    hidden, weight = make_inputs(300, 211, 32, dtype)
    tokens, log_prob = sample_linear(hidden, weight, seed=1, **options)
    assert log_prob.dtype == torch.float32 and log_prob.max() <= 0
    z = options.get("logit_scale", 1.0) * (hidden.double() @ weight.double().T)
    if cap := options.get("softcap"):
        z = cap * torch.tanh(z / cap)
    log_p = (z / options.get("log_prob_temperature", 1.0)).log_softmax(-1)
    assert_close(log_prob, log_p.gather(1, tokens[:, None])[:, 0])


SEEDS = [0, -5, 2**63 + 1, 2**64 - 1]
STEPS = [0, 3, 2**32, 2**63 + 5]


def signed_tensor(value, dtype=torch.int64):
    return torch.tensor((value + 2**63) % 2**64 - 2**63, dtype=dtype)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("seed", "step"), list(zip(SEEDS, STEPS, strict=True)))
def test_seed_and_step_may_be_tensors(monkeypatch, seed, step, backend):
    """All 64 bits of them count, and the draws are bit for bit those of integers."""
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", 5000)
    hidden, weight = make_inputs(101, 300, 9)
    options = {"row_offset": 2**32 - 50, "temperature": 0.7, "backend": backend}
    wanted = sample_linear(hidden, weight, seed=seed, step=step, **options)
    for counters in ({"step": signed_tensor(step)}, {"seed": signed_tensor(seed), "step": signed_tensor(step)}):
        drawn = sample_linear(hidden, weight, **{"seed": seed, **counters}, **options)
        assert all(torch.equal(mine, other) for mine, other in zip(drawn, wanted, strict=True))


def test_seed_and_step_may_be_narrow_tensors():
    """A negative seed of 32 bits is the same integer in 64."""
    hidden, weight = make_inputs(101, 300, 9)
    narrow = {"seed": signed_tensor(-5, torch.int32), "step": signed_tensor(3, torch.int32)}
    assert torch.equal(sample_linear(hidden, weight, **narrow)[0], sample_linear(hidden, weight, seed=-5, step=3)[0])


def test_forbidden_ids_are_checked_when_they_are_new_or_written_to():
    """And not while they stay: the check waits for a GPU, and a thought's tokens are drawn one after the other."""
    hidden, weight = make_inputs(5, 9, 3)
    forbidden = torch.tensor([2, 4])

    def draw(weight=weight):
        with WaitWatch() as watch:
            sample_linear(hidden, weight, seed=0, forbidden=forbidden)
        return len(watch.waits)

    assert draw() > 0
    assert draw() == 0
    with pytest.raises(ValueError, match=r"forbidden holds 4, but its ids must be in \[0, 4\)"):
        draw(weight[:4])
    assert draw(weight[:8]) > 0
    assert draw() > 0
    forbidden[1] = -3
    for _ in range(2):  # what was refused stays refused
        with pytest.raises(ValueError, match=r"forbidden holds -3"):
            draw()
    with torch.inference_mode():  # its tensors have no version
        forbidden = torch.tensor([2])
    assert draw() > 0
    assert draw() > 0


def test_temperature_zero_takes_the_lowest_id_among_equals():
    hidden, weight = make_exact_inputs(500, 300)
    z = hidden @ weight.T
    tokens, _ = sample_linear(hidden, weight, seed=0, temperature=0.0)
    lowest = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
    assert ((z == z.amax(-1, keepdim=True)).sum(-1) > 1).any()
    assert torch.equal(tokens, lowest)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.0])
def test_chunks_do_not_change_a_draw(monkeypatch, temperature):
    hidden, weight = make_exact_inputs(301, 1000)
    tokens, log_prob = sample_linear(hidden, weight, seed=3, temperature=temperature)
    for rows_at_once in (1, 7, 64, 300):
        monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", rows_at_once * 1000)
        again = sample_linear(hidden, weight, seed=3, temperature=temperature)
        assert torch.equal(again[0], tokens)
        torch.testing.assert_close(again[1], log_prob, rtol=1e-6, atol=1e-6)


def test_processes_that_share_the_rows_draw_what_one_draws():
    hidden, weight = make_exact_inputs(301, 1000)
    whole = sample_linear(hidden, weight, seed=3, step=4, row_offset=2**33 - 100)
    first = sample_linear(hidden[:117], weight, seed=3, step=4, row_offset=2**33 - 100)
    second = sample_linear(hidden[117:], weight, seed=3, step=4, row_offset=2**33 + 17)
    assert torch.equal(torch.cat([first[0], second[0]]), whole[0])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("rows_at_once", [7, 1000])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_rows_number_the_draws_in_place_of_their_order(monkeypatch, backend, rows_at_once, temperature):
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", rows_at_once * 300)
    hidden, weight = make_exact_inputs(101, 300)
    options = {"seed": 3, "step": 4, "temperature": temperature, "backend": backend}
    first = 2**33 - 50
    wanted = sample_linear(hidden, weight, row_offset=first, **options)
    rows = torch.arange(101) + first
    for numbers in (rows, torch.stack([rows, rows + 1], 1)[:, 0]):
        drawn = sample_linear(hidden, weight, rows=numbers, **options)
        assert all(torch.equal(mine, other) for mine, other in zip(drawn, wanted, strict=True))
    order = torch.randperm(101)
    drawn = sample_linear(hidden[order], weight, rows=rows[order], **options)
    assert all(torch.equal(mine, other[order]) for mine, other in zip(drawn, wanted, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_count_with_all_64_bits(backend):
    """Those of a negative number are two's complement; equal numbers draw alike."""
    rows = torch.tensor([5, 5, 5 + 2**32, 5 - 2**63, -1])
    first, second = row_uniforms(7, 0, rows)
    wanted = draws.draw_columns((torch.arange(1024) < 1000).double().expand(5, -1).contiguous(), first, second)
    drawn, _ = sample_linear(torch.zeros(5, 1), torch.zeros(1000, 1), seed=7, rows=rows, backend=backend)
    assert torch.equal(drawn, wanted[:, 0])
    assert drawn[0] == drawn[1] and drawn[1:].unique().numel() == 4


def test_seed_step_and_row_each_change_the_draws():
    z = torch.zeros(1000)
    base = draw_many(z, 200, seed=1)
    assert torch.equal(draw_many(z, 200, seed=1), base)
    others = [{"seed": 2}, {"seed": 1 + 2**32}, {"seed": 1, "step": 1}, {"seed": 1, "step": 2**32}]
    others += [{"seed": 1, "row_offset": 200}, {"seed": 1, "row_offset": 2**32}]
    for options in others:
        assert (draw_many(z, 200, **options) == base).float().mean() < 0.02
    assert torch.equal(draw_many(z, 150, seed=1, row_offset=50), base[50:])


def test_neither_strides_nor_autocast_change_a_draw():
    hidden, weight = make_exact_inputs(50, 300)
    wanted = sample_linear(hidden, weight, seed=3)
    strided = [torch.stack([tensor, tensor * 7], -1)[..., 0] for tensor in (hidden, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = sample_linear(*strided, seed=3)
    assert all(torch.equal(mine, plain) for mine, plain in zip(ours, wanted, strict=True))


def test_draws_compile_in_one_graph():
    hidden, weight = make_exact_inputs(5, 300)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: sample_linear(x, weight, seed=-3, step=2), fullgraph=True, backend="aot_eager")
    drawn, wanted = compiled(hidden), sample_linear(hidden, weight, seed=-3, step=2)
    torch.compiler.reset()
    assert all(torch.equal(mine, other) for mine, other in zip(drawn, wanted, strict=True))


def test_draws_have_no_gradient():
    hidden, weight = (tensor.requires_grad_() for tensor in make_inputs(5, 7, 3))
    for backend in ("torch", "reference"):
        _, log_prob = sample_linear(hidden, weight, seed=0, backend=backend)
        assert not log_prob.requires_grad


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_never_more_than_a_chunk_of_logits(monkeypatch, temperature):
    rows, vocabulary, chunk = 100, 512, 16
    monkeypatch.setattr(logits, "CPU_CHUNK_ELEMENTS", chunk * vocabulary)
    hidden, weight = make_inputs(rows, vocabulary, 6, torch.float32)
    with StorageWatch(at_least=chunk * vocabulary * 4) as watch:
        sample_linear(hidden, weight, seed=0, temperature=temperature)
    assert watch.largest == chunk * vocabulary * 4
    # Two temperatures need the probabilities besides the logits.
    assert watch.most_alive == (2 if temperature == 0.5 else 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4)}, ValueError, r"hidden has shape \[4\]"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight has shape \[9, 5\]"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, but it is float"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616, but it must be in"),
        ({"step": -1}, ValueError, "step is -1, but it must be at least 0"),
        ({"step": torch.tensor([1])}, ValueError, r"step has shape \[1\], but it must be a tensor without dimensions"),
        ({"step": torch.tensor(1.0)}, TypeError, "step has dtype torch.float32"),
        ({"seed": torch.tensor(True)}, TypeError, "seed has dtype torch.bool"),
        ({"row_offset": -1}, ValueError, "row_offset is -1, but it must be at least 0"),
        ({"row_offset": 2**63 - 1}, ValueError, "row_offset is 9223372036854775807, but it must be in"),
        ({"rows": [0, 1, 2, 3]}, TypeError, r"rows must be a tensor \[R\], but it is list"),
        ({"rows": torch.arange(3)}, ValueError, r"rows has shape \[3\], but it must be \[R\] = \[4\]"),
        ({"rows": torch.arange(4, dtype=torch.int32)}, TypeError, "rows has dtype torch.int32"),
        ({"rows": torch.arange(4, device="meta")}, ValueError, "rows is on meta, but it must be on cpu like hidden"),
        ({"rows": torch.arange(4), "row_offset": 2}, ValueError, "row_offset is 2, but beside rows, .* must be 0"),
        ({"temperature": -0.1}, ValueError, "temperature is -0.1, but it must be at least 0"),
        ({"temperature": 1e-37}, ValueError, "temperature is 1e-37, but it must be 0 or at least 1e-06"),
        ({"log_prob_temperature": 0.0}, ValueError, "log_prob_temperature is 0.0, but it must be at least 1e-06"),
        ({"forbidden": torch.tensor([-1])}, ValueError, "forbidden holds -1"),
        ({"forbidden": torch.arange(9)}, ValueError, "forbidden holds all 9 ids"),
        ({"bias": torch.zeros(9, dtype=torch.float64)}, TypeError, "bias has dtype torch.float64"),
        ({"backend": None}, ValueError, "backend is None"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"hidden": torch.zeros(4, 6), "weight": torch.zeros(9, 6), "seed": 0}
    with pytest.raises(error, match=message):
        sample_linear(**arguments | change)
