"""Text as ``generate`` makes it, in whole characters, and the thoughts in their places."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
HALF_A_CHARACTER = "\ufffd"  # what is decoded of bytes that more will follow


class GrowingText:
    """What each token adds to a text.

    A token is decoded together with those before it, since they decide whether a space comes before it and which bytes
    it ends; with a few of them, since a whole text for every token would take long.

    Attributes:
        tokens: all so far.
        show_special: special tokens are text as well.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: list[int], *, show_special: bool = False):
        self.tokenizer, self.show_special = tokenizer, show_special
        self.tokens = list(prompt)
        self._begin, self._known = 0, len(prompt)  # the last piece that was text is tokens[_begin:_known]

    def add(self, token: int) -> str:
        """What has become text with ``token``: nothing where a character is not yet whole."""
        self.tokens.append(token)
        piece = self._new()
        if not piece or piece.endswith(HALF_A_CHARACTER):
            return ""
        self._begin, self._known = self._known, len(self.tokens)
        return piece

    def rest(self) -> str:
        """What is left at the end, half of a character as it may be."""
        return self._new()

    def _new(self) -> str:
        return self._decoded(len(self.tokens))[len(self._decoded(self._known)) :]

    def _decoded(self, end: int) -> str:
        tokens = self.tokens[self._begin : end]
        options = dict(skip_special_tokens=not self.show_special, clean_up_tokenization_spaces=False)
        return cast(str, self.tokenizer.decode(tokens, **options))


class ThoughtStreamer(BaseStreamer):
    """Writes what ``generate`` says of one prompt, and on demand what it thinks, for ``generate(streamer=...)``.

    A thought is written before the token that it precedes, with its weight, as ``⟨1 4 9 9 7 | 0.28⟩``.

    Attributes:
        text: the continuation so far, so that it stands right behind the prompt, without thoughts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], Any],
        *,
        show_thoughts: bool = False,
        dimmed: bool = False,
    ):
        """
        Args:
            tokenizer: of the model.
            write: is given each piece, never an empty one.
            show_thoughts: write thoughts as well.
            dimmed: write them dimmed, by the escape codes of a terminal.
        """
        self.tokenizer, self.write = tokenizer, write
        self.show_thoughts, self.dimmed = show_thoughts, dimmed
        self.text = ""
        self._growing: GrowingText | None = None
        self._thoughts: deque[str] = deque()  # a thought may come while the token before it is still on its way

    def put_thoughts(self, thoughts: Tensor, weight: Tensor, thought_at: Tensor) -> None:
        """Take a thought before the next token ``[1, K]``, its weight ``[1]``, and whether there was one ``[1]``."""
        if self.show_thoughts:
            self._thoughts.append(self._shown(thoughts[0].tolist(), float(weight[0])) if thought_at[0] else "")

    def _shown(self, thought: list[int], weight: float) -> str:
        text = str(self.tokenizer.decode(thought, clean_up_tokenization_spaces=False)).replace("\n", "\\n")
        shown = f"⟨{text} | {weight:.2f}⟩"
        return f"{DIM}{shown}{PLAIN}" if self.dimmed else shown

    def put(self, value: Tensor) -> None:
        """Take the prompt ``[1, N]``, and then each token ``[1]``.

        Raises:
            ValueError: there are several rows.
        """
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"streamer is given {len(value)} rows, but it writes one text: generate them one by one")
        tokens = value.flatten().tolist()
        if self._growing is None:
            self.text, self._growing = "", GrowingText(self.tokenizer, tokens)
            return
        for token in tokens:
            self._write(self._thoughts.popleft() if self._thoughts else "")
            self._say(self._growing.add(token))

    def end(self) -> None:
        """Write what is left, and expect another prompt."""
        if self._growing is not None:
            self._say(self._growing.rest())
        self._growing = None
        self._thoughts.clear()

    def _say(self, piece: str) -> None:
        self.text += piece
        self._write(piece)

    def _write(self, piece: str) -> None:
        if piece:
            self.write(piece)
