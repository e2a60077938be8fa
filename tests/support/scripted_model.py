"""A model that says what a script has, for tests of what is made of its words."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers_of_kinds
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

TOKENIZER = tokenizers_of_kinds.byte_level()
SIZES = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)


class Scripted(LlamaForCausalLM):
    """Behind a text that ends with a key of the script it says one of the key's texts, each with one probability."""

    def __init__(self, script: dict[str, str | Sequence[str]], max_position_embeddings: int = 4096):
        super().__init__(
            LlamaConfig(
                vocab_size=len(TOKENIZER),
                eos_token_id=TOKENIZER.eos_token_id,
                pad_token_id=TOKENIZER.eos_token_id,
                use_cache=False,
                max_position_embeddings=max_position_embeddings,
                **SIZES,
            )
        )
        self.script = {
            cue: [
                [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
                for text in ([said] if isinstance(said, str) else said)
            ]
            for cue, said in script.items()
        }
        self.rows: list[int] = []  # of each pass

    def forward(self, input_ids, attention_mask=None, **_):
        self.rows.append(len(input_ids))
        logits = torch.full((*input_ids.shape, len(TOKENIZER)), -1e9)
        for row, ids in enumerate(input_ids):
            for token in self._next(ids.tolist()):
                logits[row, -1, token] = torch.logaddexp(logits[row, -1, token], torch.tensor(0.0))
        return CausalLMOutputWithPast(logits=logits[:, -1:])

    def _next(self, ids: list[int]) -> list[int]:
        """The next token of each text that goes on as was begun behind the last cue."""
        if ids[-1] == TOKENIZER.eos_token_id:  # of a row that has ended before others
            return ids[-1:]
        for place in range(len(ids), 0, -1):
            said = TOKENIZER.decode(ids[:place], skip_special_tokens=True)
            for cue, texts in self.script.items():
                if said.endswith(cue):
                    begun = ids[place:]
                    return [text[len(begun)] for text in texts if text[: len(begun)] == begun]
        raise AssertionError(f"the script has no cue for {said!r}")
