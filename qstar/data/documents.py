"""Rows of a dataset as documents of tokens: text, columns in a format, or chats in the tokenizer's template."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from qstar.data.values import checked, checked_text, found, is_chat
from qstar.grid import IGNORED

Batch: TypeAlias = dict[str, list[Any]]
Document: TypeAlias = tuple[list[int], list[int]]  # tokens and labels
Reader: TypeAlias = Callable[[Batch, list[int]], list[Document]]

MARKS_ASSISTANT = re.compile(r"{%-?\s*generation\s*-?%}")  # a template that says itself what the assistant wrote


def format_columns(text_format: str) -> list[str]:
    """The columns that a format like ``"Q: {question} A: {answer}"`` names.

    Raises:
        ValueError: it is no such format.
    """
    try:
        parts = list(string.Formatter().parse(text_format))
    except ValueError as error:
        raise ValueError(f"text_format is {text_format!r}, but it must be a format string: {error}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    plain = all(not spec and not conversion for _, name, spec, conversion in parts if name is not None)
    if not names or not plain or not all(names):
        raise ValueError(
            f"text_format is {text_format!r}, but it must name columns in braces, as in 'Q: {{question}} A: {{answer}}'"
        )
    return list(dict.fromkeys(names))


def fill(text_format: str, values: dict[str, str]) -> str:
    """``text_format`` with the values of its columns; a name is taken as it stands."""
    parts = string.Formatter().parse(text_format)
    return "".join(literal + ("" if name is None else values[name]) for literal, name, _, _ in parts)


def text_reader(tokenizer: PreTrainedTokenizerBase, column: str, text_format: str | None, source: str) -> Reader:
    """What tokenizes a batch of rows that hold text; a blank text gives no document, and every token is a label.

    A document ends with the end-of-sequence token, where the tokenizer has one.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    columns = [column] if text_format is None else format_columns(text_format)

    def text_of(batch: Batch, i: int, row: int) -> str:
        place = f"{source}, row {row + 1}"
        values = {name: checked_text(batch[name][i], name, place) for name in columns}
        return values[column] if text_format is None else fill(text_format, values)

    def read(batch: Batch, rows: list[int]) -> list[Document]:
        texts = [text_of(batch, i, row) for i, row in enumerate(rows)]
        texts = [text for text in texts if text and not text.isspace()]
        if not texts:
            return []
        documents = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        documents = [tokens if tokens[-1:] == end else tokens + end for tokens in documents]
        return [(tokens, tokens) for tokens in documents]

    return read


def chat_reader(tokenizer: PreTrainedTokenizerBase, column: str, source: str) -> Reader:
    """What tokenizes a batch of chats as the tokenizer's template writes them; labels are the assistant's part alone.

    Raises:
        ValueError: the tokenizer has no chat template, or cannot say what its tokens stand for.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"text_column is {column!r}, which holds chats, but the tokenizer has no chat template to write them with: "
            "take the tokenizer of a chat model"
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"text_column is {column!r}, which holds chats, but the tokenizer is a {type(tokenizer).__name__}, which "
            "cannot say which part of a text its tokens stand for: take a fast one"
        )

    def read(batch: Batch, rows: list[int]) -> list[Document]:
        return [_chat(tokenizer, batch[column][i], column, f"{source}, row {row + 1}") for i, row in enumerate(rows)]

    return read


def _chat(tokenizer: PreTrainedTokenizerBase, value: Any, column: str, place: str) -> Document:
    messages: Any = checked(value, column, place)
    if not is_chat(messages):
        raise ValueError(f"{place}: column {column!r} holds {found(value)}, but the first row holds a chat")
    template: Any = tokenizer.get_chat_template()
    written = _marked if MARKS_ASSISTANT.search(template) else _prompted
    try:
        whole, spans = written(tokenizer, messages)
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"{place}, column {column!r}: the tokenizer's chat template refuses: {error}") from error
    said = bytearray(len(whole))
    for begin, end in spans:
        said[begin:end] = b"\1" * (end - begin)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mine = [begin < end and all(said[begin:end]) for begin, end in encoded["offset_mapping"]]
    tokens = encoded["input_ids"]
    return tokens, [token if learned else IGNORED for token, learned in zip(tokens, mine, strict=True)]


def _prompted(tokenizer: PreTrainedTokenizerBase, messages: Any) -> tuple[str, list[tuple[int, int]]]:
    """The chat as the template writes it, and from where to where in it the assistant answers a prompt."""

    def written(count: int, prompt: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompt))

    whole, spans = written(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ValueError("the assistant speaks first, but there must be something to answer")
        before, after = written(i, True), written(i + 1, False)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"it writes message {i + 1} otherwise once the chat goes on, so that the assistant's part cannot be "
                "told: mark it in the template by {% generation %}"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def _marked(tokenizer: PreTrainedTokenizerBase, messages: Any) -> tuple[str, list[tuple[int, int]]]:
    """The same, from the marks in the template."""
    options: dict[str, Any] = {"chat_template": tokenizer.get_chat_template(), **tokenizer.special_tokens_map}
    [whole], [spans] = cast(Any, render_jinja_template([messages], return_assistant_tokens_mask=True, **options))
    return whole, spans
