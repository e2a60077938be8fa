"""The text of single tokens, so that the pieces of a text make up the text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qstar.generation.streaming import HALF_A_CHARACTER, GrowingText

ANCHOR = "a"  # what stands before tokens that have no text before them, so that they keep their space


class Pieces:
    """Text of tokens, special ones included.

    A token that holds a part of a character has no text by itself. Among others it is ``""``, and the token that ends
    the character has it; alone it is its number, as ``<123>``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._anchor = [int(token) for token in tokenizer(ANCHOR, add_special_tokens=False)["input_ids"]]
        self._alone: dict[int, str] = {}

    def of_text(self, tokens: Sequence[int]) -> list[str]:
        """Of a text from its first token on."""
        return self._grown([], tokens)

    def of_thought(self, tokens: Sequence[int]) -> list[str]:
        """Of tokens that come after others."""
        return self._grown(self._anchor, tokens)

    def alone(self, token: int) -> str:
        """Of one token that comes after others."""
        if token not in self._alone:
            [piece] = self.of_thought([token])
            self._alone[token] = f"<{token}>" if piece.strip(HALF_A_CHARACTER) == "" else piece
        return self._alone[token]

    def _grown(self, before: list[int], tokens: Sequence[int]) -> list[str]:
        growing = GrowingText(self.tokenizer, before, show_special=True)
        pieces = [growing.add(token) for token in tokens]
        if pieces:
            pieces[-1] += growing.rest() if not pieces[-1] else ""
        return pieces
