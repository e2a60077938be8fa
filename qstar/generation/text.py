"""The text that a generation has been given and has said so far."""

from __future__ import annotations

import torch
from torch import Tensor

from qstar.grid import Text


class TextSoFar:
    """Tokens ``[B, N]`` with padding on the left, which grow at their end.

    Attributes:
        tokens: ``[B, N]`` int64.
        padding: how many tokens at the left of a row are padding, ``[B, 1]`` int64; None where none are.
    """

    def __init__(self, tokens: Tensor, padding: Tensor | None = None):
        self.tokens, self.padding = tokens, padding

    @classmethod
    def from_inputs(cls, tokens: Tensor, attention_mask: Tensor | None) -> TextSoFar:
        """The beginning ``[B, n]`` of a text, under a mask ``[B, n]``, 0 for padding.

        Raises:
            ValueError: the mask has a hole, or padding on its right; a row is all padding.
        """
        if attention_mask is None:
            return cls(tokens)
        mask = attention_mask[:, : tokens.shape[1]]
        text = Text.from_inputs(tokens, mask)
        if not mask[:, -1].all():
            row = int((mask[:, -1] == 0).nonzero()[0])
            raise ValueError(
                f"attention_mask ends with 0 in row {row}, but padding must stand on the left of a text that is to go "
                "on: tokenizer.padding_side = 'left'"
            )
        return cls(tokens, None if text.start is None else text.start.amax(1, keepdim=True))

    @property
    def length(self) -> int:
        """N."""
        return self.tokens.shape[1]

    def positions(self, begin: int, end: int) -> Tensor:
        """Positions ``[B, end - begin]`` of the tokens from ``begin`` to ``end``, which may lie beyond the text."""
        index = torch.arange(begin, end, device=self.tokens.device)[None]
        if self.padding is None:
            return index.expand(len(self.tokens), -1)
        return (index - self.padding).clamp(min=0)

    def start(self, length: int) -> Tensor | None:
        """The first token that each of ``length`` may see, ``[B, length]``; None where that is the first for all."""
        return None if self.padding is None else self.padding.expand(-1, length)

    def followed_by(self, tokens: Tensor) -> TextSoFar:
        """The text with ``tokens`` ``[B, n]`` behind it."""
        return TextSoFar(torch.cat([self.tokens, tokens], dim=1), self.padding)

    def rows(self, rows: Tensor) -> TextSoFar:
        """The text of these rows ``[B']``."""
        padding = None if self.padding is None else self.padding.index_select(0, rows)
        return TextSoFar(self.tokens.index_select(0, rows), padding)
