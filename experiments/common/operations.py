"""Multiply-adds of a training step, so that a control can be given as much computation as what it controls.

Counted is what a step must multiply: every weight matrix once for each token that it reads, queries with keys and
probabilities with values, and the vocabulary head where something is predicted. A backward costs twice its forward.
Left out are sums, norms and activations, which are as much for all; and what is computed twice to save memory, since it
buys nothing. A row counts as one document: where it holds several, attention has less to do in every variant.
"""

from __future__ import annotations

from typing import NamedTuple

from qstar.model import QuietStarModel, embedding_rows


class Sizes(NamedTuple):
    """What the costs of a decoder depend on.

    Attributes:
        matrices: numbers in the weight matrices that each token is multiplied with, head and embeddings aside.
        mixing: the same of the mixing head.
        attention: multiply-adds of a query with a key and of a probability with a value, in all layers together.
        head: of a state with the whole vocabulary.
    """

    matrices: int
    mixing: int
    attention: int
    head: int

    @classmethod
    def of(cls, model: QuietStarModel) -> Sizes:
        """Those of a model."""
        config, rows = model.config.get_text_config(decoder=True), embedding_rows(model)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        decoder, mixing = model.base_model.parameters(), model.qstar_mixing_head.parameters()
        return cls(
            matrices=sum(each.numel() for each in decoder if each.dim() == 2) - rows.numel(),
            mixing=sum(each.numel() for each in mixing if each.dim() == 2),
            attention=2 * config.num_hidden_layers * width,
            head=rows.numel(),
        )


def plain_row(sizes: Sizes, length: int) -> int:
    """Multiply-adds of learning a row of ``length`` tokens without thoughts."""
    pairs = length * (length + 1) // 2
    return 3 * (length * (sizes.matrices + sizes.head) + pairs * sizes.attention)


def thinking_row(model: QuietStarModel, length: int, *, scored: float = 0.5, positions: int | None = None) -> int:
    """Multiply-adds of learning a row of ``length`` tokens with thoughts: thinking, and one packed pass.

    Args:
        model: whose numbers of rationales and tokens are counted with; pauses need no thinking.
        length: N, of the text.
        scored: share of the thoughts whose tokens are scored for the policy: those whose advantage is not 0. With
            advantages that are clamped at 0 about one half, else all.
        positions: of the row that are thought at, by chance, so that half of the text stands before one. None: all.
    """
    sizes, settings, grid = Sizes.of(model), model.qstar, model.grid(length)
    chosen = length if positions is None else min(positions, length)
    pairs, before = length * (length + 1) // 2, chosen * (length + 1) // 2
    own = chosen * settings.rationales * grid.rationale_length * (grid.rationale_length + 1) // 2
    sampled = chosen * settings.rationales * settings.thought_tokens
    talked = chosen * settings.rationales * settings.ahead_tokens
    slots = grid.slots - 1  # of a position, beside that of the text
    packed = (length + chosen * slots) * sizes.matrices + (pairs + slots * before + own) * sizes.attention
    policy = 0 if settings.pauses else round(scored * sampled)
    learned = 3 * (packed + talked * sizes.mixing + (length + talked + policy) * sizes.head)
    if settings.pauses:
        return learned
    steps = settings.rationales * settings.thought_tokens
    among = chosen * settings.rationales * settings.thought_tokens * (settings.thought_tokens + 1) // 2
    thinking = (length + sampled) * sizes.matrices + (pairs + steps * before + among) * sizes.attention
    return learned + thinking + sampled * sizes.head


def equal_steps(
    model: QuietStarModel,
    *,
    steps: int,
    rows: int,
    plain_rows: int,
    length: int,
    scored: float = 0.5,
    positions: int | None = None,
) -> int:
    """Steps of plain training on ``plain_rows`` rows that cost at least as much as ``steps`` on ``rows`` with thoughts.

    The row of ``length`` tokens is that of both; its thoughts are as :func:`thinking_row` counts them.
    """
    spent = steps * rows * thinking_row(model, length, scored=scored, positions=positions)
    return -(-spent // (plain_rows * plain_row(Sizes.of(model), length)))
