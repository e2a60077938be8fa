"""Counter-based random numbers."""

import math

import pytest
import torch

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
