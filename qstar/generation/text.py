"""The text that a generation has been given and has said so far."""

from __future__ import annotations

import torch
from torch import Tensor


class TextSoFar:
    """Tokens ``[B, N]`` with padding on the left, which grow at their end.

    Attributes:
        tokens: ``[B, N]`` int64.
        padding: how many tokens at the left of a row are padding, ``[B, 1]`` int64; None where none are.
    """

    def __init__(self, tokens: Tensor, padding: Tensor | None = None):
        self.tokens, self.padding = tokens, padding

    def under(self, mask: Tensor) -> TextSoFar:
        """The text with the padding that ``mask`` ``[B, N]`` shows, 0 for padding; a row may be padding so far.

        Raises:
            ValueError: the mask has another length than the text, or padding elsewhere than on its left.
        """
        if mask.shape != self.tokens.shape:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, but it must be {list(self.tokens.shape)} as the text"
            )
        is_text = mask.to(self.tokens.device).bool()
        padding = (is_text.cumsum(1) == 0).sum(1, keepdim=True)
        if bool(((~is_text).sum(1, keepdim=True) > padding).any()):
            row = int(((~is_text).sum(1) > padding[:, 0]).nonzero()[0])
            raise ValueError(
                f"attention_mask has a 0 behind text in row {row}, but padding must stand on the left of a text that "
                "is to go on: tokenizer.padding_side = 'left'"
            )
        return TextSoFar(self.tokens, padding if bool(padding.any()) else None)

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

    def begins_with_padding_of(self, before: TextSoFar) -> bool:
        """Whether what was the text ``before`` has the padding that it had."""
        padding = [torch.zeros_like(x.tokens[:, :1]) if x.padding is None else x.padding for x in (self, before)]
        return torch.equal(padding[0].clamp(max=before.length), padding[1])
