"""Texts that end a continuation.

``stop_strings`` of transformers looks for them in the vocabulary, which fails where the tokenizer knows whole words
alone: nothing in the vocabulary tells that a space stands between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopTexts(StoppingCriteria):
    """Ends each row whose continuation holds one of some texts, a criterion for ``generate(stopping_criteria=...)``."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_length: int):
        """
        Args:
            tokenizer: of the model.
            texts: none of them empty.
            prompt_length: tokens before the continuations, padding included.
        """
        self.tokenizer, self.texts, self.prompt_length = tokenizer, tuple(texts), prompt_length

    def __call__(self, input_ids: LongTensor, scores: FloatTensor, **kwargs: Any) -> Tensor:
        """Which rows of ``input_ids`` ``[B, N]`` have come to their end, ``[B]`` boolean."""
        said = self.tokenizer.batch_decode(
            input_ids[:, self.prompt_length :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ended = [any(text in each for text in self.texts) for each in said]
        return torch.tensor(ended, device=input_ids.device)
