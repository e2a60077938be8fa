"""Sampling inside the product draws what ``sample_linear`` draws; without a GPU in Triton's interpreter."""

from importlib import import_module

import pytest
import torch

from qstar_kernels import sample_linear
from qstar_kernels.testing import assert_close

pytest.importorskip("triton")
epilogue_sampling = import_module("peers.epilogue_sampling")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def head(rows, vocabulary, width, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator) * scale
    weight = torch.randn(vocabulary, width, generator=generator) * width**-0.5
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "options"),
    [
        (131, 300, 40, {"seed": 5}),
        (1, 1, 3, {"seed": 0}),
        (37, 128, 32, {"seed": -7, "step": 2**63 + 5}),
        (5, 1101, 64, {"seed": 2**64 - 1, "row_offset": 2**40}),
    ],
)
def test_sampling_in_the_product_draws_what_sample_linear_draws(rows, vocabulary, width, options):
    hidden, weight = head(rows, vocabulary, width, scale=2.0)
    tokens, log_prob = epilogue_sampling.sample_in_epilogue(hidden, weight, **options)
    wanted, wanted_log_prob = sample_linear(hidden, weight, backend="reference", **options)
    same = tokens == wanted
    assert (~same).sum() <= 1  # a uniform within rounding of a boundary
    torch.testing.assert_close(log_prob[same], wanted_log_prob[same], rtol=1e-5, atol=1e-5)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert_close(log_prob, exact)


def test_sampling_in_the_product_where_rows_draw_the_same_tile():
    hidden, weight = head(200, 600, 16)
    weight[5], weight[500] = 0.0, 0.0
    weight[5, 0], weight[500, 0] = 20.0, 20.0
    hidden[:, 0] = 2.0
    tokens, log_prob = epilogue_sampling.sample_in_epilogue(hidden, weight, seed=1)
    wanted, wanted_log_prob = sample_linear(hidden, weight, seed=1)
    assert torch.equal(tokens, wanted) and set(tokens.tolist()) == {5, 500}
    torch.testing.assert_close(log_prob, wanted_log_prob, rtol=1e-5, atol=1e-5)


def test_sampling_in_the_product_of_16_bit_rows():
    hidden, weight = head(20, 300, 24, torch.bfloat16)
    tokens, log_prob = epilogue_sampling.sample_in_epilogue(hidden, weight, seed=3)
    wanted, wanted_log_prob = sample_linear(hidden, weight, seed=3)
    assert (tokens != wanted).sum() <= 1
    torch.testing.assert_close(log_prob, wanted_log_prob, rtol=1e-5, atol=1e-5)


def test_sampling_in_the_product_refuses_strided_tensors():
    hidden, weight = head(4, 8, 6)
    with pytest.raises(ValueError, match=r"hidden has strides \(12, 2\)"):
        epilogue_sampling.sample_in_epilogue(torch.cat([hidden, hidden], 1)[:, ::2], weight, seed=0)
