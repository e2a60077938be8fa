"""Multiply-adds of a training step, so that plain training can be given as many.

Counted are the matrix products of a Llama, those of attention, and those of the mixing head. A backward pass costs two
forward passes. Norms, rotary embeddings, softmax, sampling and the optimizer are left out; documents that share a row
are counted as if they saw each other, a few per cent at these lengths, for both kinds of step.

With S tokens a row, r thoughts of K tokens at each of P positions of it and m tokens ahead, a row of a plain step reads S
tokens, three times. A row of a Quiet-STaR step reads S tokens and r P K sampled ones once to think; then S tokens and
r P (K + m + 1) of the thoughts three times to talk and learn. The policy's head is counted for every sampled token,
though thoughts without a reward never meet it: what is counted too much here, plain training gets.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from qstar.grid import ThoughtGrid

PASSES = 3  # forward and backward, in forward passes


@dataclass(frozen=True)
class Decoder:
    """Multiply-adds of a decoder.

    Attributes:
        token: of a token in all layers, attention left out.
        pair: of a query and a key that it looks at, in all layers.
        head: of a token whose next one is predicted.
        mix: of a thought that is weighed.
    """

    token: int
    pair: int
    head: int
    mix: int

    @classmethod
    def of(cls, config: LlamaConfig) -> Decoder:
        """Those of a Llama."""
        width, layers = config.hidden_size, config.num_hidden_layers
        size = getattr(config, "head_dim", None) or width // config.num_attention_heads
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        layer = 2 * width * queries + 2 * width * keys + 3 * width * config.intermediate_size
        return cls(layers * layer, layers * 2 * queries, config.vocab_size * width, 3 * width * width + width)


def plain_step(decoder: Decoder, rows: int, length: int) -> int:
    """Multiply-adds of a step that learns the likelihood of ``rows`` of ``length`` tokens."""
    return PASSES * rows * _read(decoder, length, heads=length)


def thinking_step(decoder: Decoder, rows: int, grid: ThoughtGrid, positions: int | None = None) -> int:
    """Multiply-adds of a step of Quiet-STaR.

    Args:
        decoder: the model.
        rows: in the step.
        grid: how long a row is, and how many thoughts of how many tokens stand at a position.
        positions: of a row with thoughts; all by default.
    """
    length, sampled, ahead = grid.positions, grid.thought_tokens, grid.ahead_tokens
    thoughts = grid.rationales * (length if positions is None else positions)
    thinking = _read(decoder, length, heads=0) + thoughts * _further(decoder, length, sampled, heads=sampled)
    talking = _read(decoder, length, heads=length)
    talking += thoughts * (
        _further(decoder, length, grid.rationale_length, heads=sampled + ahead) + ahead * decoder.mix
    )
    return rows * (thinking + PASSES * talking)


def _read(decoder: Decoder, length: int, heads: int) -> int:
    """A text, read once; so many of its tokens meet the head."""
    return length * decoder.token + length * (length + 1) // 2 * decoder.pair + heads * decoder.head


def _further(decoder: Decoder, length: int, tokens: int, heads: int) -> int:
    """A thought behind a text of mean length, read once."""
    pairs = tokens * (length + 1) // 2 + tokens * (tokens + 1) // 2
    return tokens * decoder.token + pairs * decoder.pair + heads * decoder.head
