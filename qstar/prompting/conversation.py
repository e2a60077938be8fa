"""A chat with a model that thinks: what was said, and a cache of it, so that it need not be read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qstar.classes import ThinkingModel
from qstar.generation.naming import CACHE
from qstar.generation.settings import GenerationSettings
from qstar.generation.streaming import ThoughtStreamer
from qstar.prompting.prompts import check_length
from qstar.prompting.settings import ChatSettings


class Conversation:
    """Messages so far, and the model's answers to them.

    Attributes:
        model: in ``eval()``.
        tokenizer: its own, with a chat template.
        messages: each with ``role`` and ``content``.
        show_thoughts: write thoughts in their places.
        known: how many tokens did not have to be read again for the last answer.
    """

    def __init__(
        self,
        model: ThinkingModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        decoding: ChatSettings,
        *,
        system: str | None = None,
        show_thoughts: bool = False,
        dimmed: bool = False,
    ):
        """
        Raises:
            ValueError: the tokenizer has no chat template; a setting would have no effect.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                "tokenizer.chat_template is not set, but a chat must be written in one: take a model that was trained "
                "to chat, or continue plain text by qstar generate"
            )
        self.model, self.tokenizer = model, tokenizer
        self.settings, self.decoding, self.system = settings, decoding, system
        self.show_thoughts, self.dimmed = show_thoughts, dimmed
        self._thinking = settings
        self.messages: list[dict[str, str]] = []
        self._past: Any = None
        self._read: Tensor | None = None
        decoding.check_effect(model.generation_config)
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system's message alone."""
        self.messages = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self.known = 0
        self._forget()

    def think(self, think: bool) -> None:
        """Think before tokens from now on, or no longer."""
        # Where there are no thoughts, their settings would have no effect and be refused.
        self._thinking = replace(self.settings, think=True) if think else GenerationSettings(think=False)
        self._forget()

    def answer(self, text: str, write: Callable[[str], Any]) -> str:
        """Say ``text`` and return the answer, each piece of which is written as soon as it is made.

        Where it is interrupted, what has been said of the answer stands in the messages.

        Raises:
            ValueError: the template refuses the messages; they are too long. They are then as they were.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._written(messages)
        check_length(self.model, self._thinking, tokens.shape[1], self.decoding.max_new_tokens)
        past = self._past if self._goes_on(tokens) else None
        known = 0 if past is None else past.get_seq_length()
        self._forget()  # generating changes the cache, which would be of no use after an interruption
        streamer = ThoughtStreamer(self.tokenizer, write, show_thoughts=self.show_thoughts, dimmed=self.dimmed)
        try:
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=past,
                return_dict_in_generate=True,
                streamer=streamer,
                **asdict(self._thinking),
                **self.decoding.arguments(self.model.generation_config, self.tokenizer, tokens.shape[1]),
            )
            self._past = output[CACHE]
            self._read = output.sequences[:, : self._past.get_seq_length()]
        except KeyboardInterrupt:
            self.messages = [*messages, {"role": "assistant", "content": streamer.text}]
            raise
        self.known = known
        self.messages = [*messages, {"role": "assistant", "content": streamer.text}]
        return streamer.text

    def _written(self, messages: list[dict[str, str]]) -> Tensor:
        """The chat as the template writes it, up to where the answer begins, ``[1, N]``."""
        try:
            tokens = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the tokenizer's chat template refuses: {error}") from error
        return cast(Any, tokens)["input_ids"].to(self.model.device)

    def _goes_on(self, tokens: Tensor) -> bool:
        """Whether a text goes on from what has been read; a template may write it otherwise than it was said."""
        if self._read is None:
            return False
        length = self._read.shape[1]
        return length < tokens.shape[1] and torch.equal(tokens[:, :length], self._read)

    def _forget(self) -> None:
        self._past = self._read = None
