"""Counter-based random numbers."""

import math

import pytest
import torch

from qstar_kernels.common import random_bits
from qstar_kernels.common.random_bits import LOW_32, philox4x32, row_uniforms, uniform


def counter(*words):
    return tuple(torch.tensor([word]) for word in words)


@pytest.mark.parametrize(
    ("words", "key", "wanted"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((LOW_32,) * 4, (LOW_32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(words, key, wanted):
    assert tuple(word.item() for word in philox4x32(counter(*words), key)) == wanted


@pytest.mark.parametrize("backwards", [False, True])
def test_philox_in_the_lanes_of_one_integer_is_that_of_each_counter(backwards):
    """A lane of 64 bits for each; the highest words next to the lowest, so that nothing may spill over."""
    ones = 1 + 2**64 + 2**128
    counters = [(LOW_32,) * 4, (0,) * 4, (1, LOW_32, 2**31, 5)][:: -1 if backwards else 1]
    key = 0xA4093822, 0x299F31D0
    lanes = [sum(word << 64 * lane for lane, word in enumerate(words)) for words in zip(*counters, strict=True)]
    found = philox4x32(lanes, tuple(word * ones for word in key), ones)
    for lane, words in enumerate(counters):
        wanted = [word.item() for word in philox4x32(counter(*words), key)]
        assert [word >> 64 * lane & LOW_32 for word in found] == wanted


@pytest.mark.parametrize("count", [0, 1, 3, random_bits.FEW_ROWS, random_bits.FEW_ROWS + 1])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (-7, 2**63 + 5), (2**64 - 1, 2**32)])
def test_a_row_s_uniforms_do_not_depend_on_how_many_there_are(count, seed, step):
    rows = torch.arange(count) * 2**53 - 2**62
    found = row_uniforms(seed, step, rows)
    many = row_uniforms(seed, step, torch.cat([rows, torch.arange(2 * random_bits.FEW_ROWS)]))
    for mine, wanted in zip(found, many, strict=True):
        assert mine.dtype == torch.float64 and torch.equal(mine, wanted[:count])


@pytest.mark.parametrize("count", [0, 3, random_bits.FEW_ROWS + 1])
def test_a_range_of_rows_has_the_uniforms_of_its_numbers(count):
    first = 2**63 - 1 - count
    found = row_uniforms(3, 4, range(first, first + count), torch.device("cpu"))
    wanted = row_uniforms(3, 4, torch.arange(first, first + count))
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


def test_layout_of_the_random_words():
    seed, step, row = 0x0123456789ABCDEF, 0xFEDCBA9876543210, 0x1122334455667788
    w0, w1, w2, w3 = philox4x32(counter(0x55667788, 0x11223344, 0x76543210, 0xFEDCBA98), (0x89ABCDEF, 0x01234567))
    first, second = row_uniforms(seed, step, torch.tensor([row]))
    assert first.item() == ((w0.item() << 21) + (w1.item() >> 11)) / 2**53
    assert second.item() == ((w2.item() << 21) + (w3.item() >> 11)) / 2**53


def test_uniforms_are_uniform_and_independent():
    count = 200_000
    streams = [*row_uniforms(7, 0, torch.arange(count)), row_uniforms(7, 1, torch.arange(count))[0]]
    streams += [row_uniforms(8, 0, torch.arange(count))[0], row_uniforms(7, 0, torch.arange(count) + 2**32)[0]]
    ladder = torch.arange(1, count + 1, dtype=torch.float64) / count
    for stream in streams:
        assert stream.min() >= 0 and stream.max() < 1
        assert torch.equal(stream * 2**53, (stream * 2**53).floor())
        kolmogorov_smirnov = (stream.sort().values - ladder).abs().max() * math.sqrt(count)
        assert kolmogorov_smirnov < 1.95  # exceeded once in a thousand
    correlation = torch.corrcoef(torch.stack(streams)).fill_diagonal_(0).abs().max()
    assert correlation < 4 / math.sqrt(count)


@pytest.mark.parametrize("tail", ["upper", "lower"])
@pytest.mark.parametrize("depth", [0.1, 1.0, 5.0, 10.0, 15.0, 20.0])
def test_both_tails_of_a_uniform_have_their_share(depth, tail):
    """e^-depth of all words, counted: a token that far below the rest is drawn as often as it should be."""
    share = math.exp(-depth)

    def within(words):
        value = uniform(*(torch.tensor([part]) for part in (words >> 32, words & LOW_32))).item()
        return value < share if tail == "lower" else value < 1 - share

    found, end = 0, 2**64  # the words that are within are the first ones
    while found < end:
        middle = (found + end) // 2
        found, end = (middle + 1, end) if within(middle) else (found, middle)
    counted = found if tail == "lower" else 2**64 - found
    assert counted / 2**64 == pytest.approx(share, rel=1e-6)
