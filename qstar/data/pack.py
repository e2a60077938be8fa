"""Documents packed into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from qstar.data.documents import Batch, Document, chat_reader, format_columns, text_reader
from qstar.data.load import AnyDataset
from qstar.data.values import is_chat
from qstar.grid import IGNORED

FIRST_ROWS = 1000  # of a stream: where none of them holds a token to predict, none is expected


def pack(
    texts: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    seq_length: int,
    text_column: str = "text",
    *,
    text_format: str | None = None,
    source: str = "dataset",
) -> AnyDataset:
    """Tokenize documents and pack them into rows of at most ``seq_length`` tokens.

    Every document of text ends with the tokenizer's end-of-sequence token, where it has one; a blank one is left out.
    A row holds ``input_ids`` and ``position_ids``, which start again at 0 with each document: no thought looks into
    another document. Of chats it also holds ``labels``, -100 but for what the assistant says. The last row of every
    thousand documents may be shorter; only a row of a single token is dropped.

    Args:
        texts: from :func:`qstar.data.load_texts`.
        tokenizer: of the model; of chats its template is used.
        seq_length: tokens in a row.
        text_column: the column that holds the text, or chats as lists of messages with ``role`` and ``content``.
        text_format: a text made of columns, ``"Q: {question}"``, in the place of ``text_column``.
        source: what errors call ``texts``.

    Raises:
        ValueError: a column that is not there; ``seq_length`` is below 2; there are no rows; and, when it is read, a
            row that holds something else than text or a chat.
    """
    if seq_length < 2:
        raise ValueError(f"seq_length is {seq_length}, but it must be at least 2")
    first = next(iter(texts), None)
    if first is None:
        raise ValueError(f"{source} holds no rows")
    columns = texts.column_names or list(first)
    _check_columns(columns, text_column, text_format)
    chats = text_format is None and is_chat(first[text_column])
    if chats:
        read = chat_reader(tokenizer, text_column, source)
    else:
        read = text_reader(tokenizer, text_column, text_format, source)

    def rows(batch: Batch, indices: list[int]) -> dict[str, list[list[int]]]:
        packed = list(_rows(read(batch, indices), seq_length))
        names = ("input_ids", "position_ids", "labels")[: 3 if chats else 2]
        return {name: [row[part] for row in packed] for part, name in enumerate(names)}

    return texts.map(rows, batched=True, batch_size=1000, with_indices=True, remove_columns=columns)


def _check_columns(columns: list[str], text_column: str, text_format: str | None) -> None:
    there = ", ".join(map(repr, columns))
    for name in [] if text_format is None else format_columns(text_format):
        if name not in columns:
            raise ValueError(f"text_format names {name!r}, but the dataset has {there}")
    if text_format is None and text_column not in columns:
        chats = "; text_column='messages' reads chats" if "messages" in columns else ""
        raise ValueError(f"text_column is {text_column!r}, but the dataset has {there}{chats}")


def _rows(documents: list[Document], seq_length: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Rows of tokens, of their positions in their documents and of labels."""
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for tokens, labels in documents:
        begin = 0
        while begin < len(tokens):
            end = min(begin + seq_length - len(ids), len(tokens))
            positions += range(end - begin)
            ids += tokens[begin:end]
            targets += labels[begin:end]
            begin = end
            if len(ids) == seq_length:
                yield ids, positions, targets
                ids, positions, targets = [], [], []
    if len(ids) > 1:
        yield ids, positions, targets


def check_targets(rows: AnyDataset, source: str) -> None:
    """Refuse packed rows that hold nothing to predict; of a stream, the first thousand rows are read.

    Raises:
        ValueError: as it says; or what is wrong with the rows that were read.
    """
    for row in islice(rows, FIRST_ROWS if isinstance(rows, IterableDataset) else None):
        labels = row.get("labels", row["input_ids"])
        if any(position and label != IGNORED for position, label in zip(row["position_ids"], labels, strict=True)):
            return
    raise ValueError(f"{source} holds no token to predict: its documents are empty, or none is longer than one token")
