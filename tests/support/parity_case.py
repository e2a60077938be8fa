"""The case that the authors' code and ours both compute: a tiny Mistral, a text and its thoughts, all from formulas.

Every number is a hash of its name and place, so that two programs under different libraries agree on it to the bit.
"""

from __future__ import annotations

import zlib

import numpy as np

WORDS, VOCABULARY = 94, 96  # of the tokenizer and, with the two thought tokens, of the model
START, END, PAD = 94, 95, 2
START_INIT, END_INIT = 5, 9  # whose embeddings the thought tokens begin with
BATCH, POSITIONS = 2, 24
LENGTHS = {"whole": (24, 24), "padded": (24, 17)}
THOUGHT_TOKENS, AHEAD_TOKENS, RATIONALES = 9, 4, 2  # the authors' n_ahead 12, n_ahead_talk 4, n_passes 2
REINFORCE_TEMPERATURE = 3.0
HEAD_WIDTH, ROPE_THETA = 16, 10000.0

CONFIG = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    sliding_window=4096,
    tie_word_embeddings=False,
)


def hashed(name: str, count: int) -> np.ndarray:
    """``count`` integers of 64 bits from splitmix64, seeded by the name."""
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(zlib.crc32(name.encode())) << np.uint64(20)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1)."""
    bits = hashed(name, int(np.prod(shape))) >> np.uint64(11)
    return (bits.astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


def integers(name: str, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    return (hashed(name, int(np.prod(shape))) % np.uint64(high - low)).astype(np.int64).reshape(shape) + low


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A parameter in float64; those of the mixing head are called ``head.*``."""
    u = uniform(f"weight {name}", shape)
    if "norm" in name:
        return 1.0 + 0.2 * u
    if name.endswith("bias"):
        return 0.1 * u
    if "embed_tokens" in name:
        return u
    return (1.5 if name == "lm_head.weight" else 1.0) * u * np.sqrt(3.0 / shape[-1])


def text(padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, ``[B, N]`` int64."""
    tokens = integers("tokens", (BATCH, POSITIONS), 3, WORDS)
    mask = np.arange(POSITIONS) < np.array(LENGTHS[padding])[:, None]
    return np.where(mask, tokens, PAD), mask.astype(np.int64)


def thoughts() -> np.ndarray:
    """``[B, N, r, K]`` int64."""
    return integers("thoughts", (BATCH, POSITIONS, RATIONALES, THOUGHT_TOKENS), 0, WORDS)


def fingerprint(name: str, gradient: np.ndarray) -> list[float]:
    """Its norm, and its products with three vectors of uniforms, each divided by ``sqrt(size / 3)``."""
    g = gradient.ravel()
    probes = [g @ uniform(f"probe {i} grad/{name}", g.shape) / np.sqrt(g.size / 3) for i in range(3)]
    return [float(x) for x in (np.sqrt(g @ g), *probes)]
