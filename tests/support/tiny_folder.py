"""Tiny models in folders: as ``qstar train`` would leave one that thinks, and one to begin with."""

from __future__ import annotations

from pathlib import Path

import tiny

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def thinking_folder(folder: Path, chat_template: str | None = None, **settings) -> Path:
    """``folder`` with a model whose thoughts count, and that says letters only, since other words are not shown."""
    model, tokenizer = tiny.thinking_model(**(dict(thought_tokens=3, check=False) | settings)), tiny.tokenizer()
    tokens = [model.qstar.start_token, model.qstar.end_token]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.chat_template = chat_template
    words = [word for word in tiny.WORDS if len(word) > 1 and word != tokenizer.eos_token]
    model.generation_config.suppress_tokens = tokenizer.convert_tokens_to_ids([*words, *tokens])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def base_folder(folder: Path, family: str = "llama", **changes) -> str:
    """The name of ``folder``, with a model of ``family`` that does not think, and its tokenizer."""
    tiny.plain_model(family, **changes).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)
