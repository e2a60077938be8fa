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
        self.script = {cue: [texts] if isinstance(texts, str) else list(texts) for cue, texts in script.items()}
        self.rows: list[int] = []  # of each pass

    def forward(self, input_ids, attention_mask=None, **_):
        self.rows.append(len(input_ids))
        logits = torch.full((*input_ids.shape, len(TOKENIZER)), -1e9)
        for row, ids in enumerate(input_ids):
            for token in self._next(TOKENIZER.decode(ids, skip_special_tokens=True)):
                logits[row, -1, token] = torch.logaddexp(logits[row, -1, token], torch.tensor(0.0))
        return CausalLMOutputWithPast(logits=logits[:, -1:])

    def _next(self, said: str) -> list[int]:
        """The next token of each text that goes on with what was said: of the cue that stands last in it."""
        places = {said.rfind(cue) + len(cue): cue for cue in self.script if cue in said}
        place = max(places)
        begun = said[place:]
        texts = [text for text in self.script[places[place]] if text.startswith(begun)]
        assert texts, f"the script does not go on behind {said!r}"
        left = [text[len(begun) :] for text in texts]
        return [TOKENIZER(text)["input_ids"][0] if text else TOKENIZER.eos_token_id for text in left]
