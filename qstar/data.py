"""Text from a hub name, a local file or a ``datasets`` object, packed into rows of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qstar.grid import IGNORED

LOADERS = {
    ".txt": ("text", {"sample_by": "paragraph"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
AnyDataset: TypeAlias = Dataset | IterableDataset


def load_texts(
    dataset: str | Path | AnyDataset | DatasetDict | IterableDatasetDict, split: str = "train"
) -> AnyDataset:
    """The documents that ``dataset`` names.

    Args:
        dataset: a hub name (streamed), a ``.txt`` file (one document a paragraph), a ``.jsonl``, ``.json`` or
            ``.parquet`` file, or an object of ``datasets``.
        split: the split of a hub dataset or of a dictionary of datasets.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a file of another kind, or a split that is not there.
        TypeError: something else.
    """
    if isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        if split not in dataset:
            raise ValueError(f"split is {split!r}, but dataset has {', '.join(map(repr, dataset))}")
        return dataset[split]
    if not isinstance(dataset, (str, Path)):
        raise TypeError(f"dataset must be a name, a path or a datasets object, but it is {type(dataset).__name__}")
    path = Path(dataset)
    if path.is_file():
        if path.suffix not in LOADERS:
            raise ValueError(f"dataset is {str(path)!r}, but a file must end in {', '.join(LOADERS)}")
        loader, options = LOADERS[path.suffix]
        return load_dataset(loader, data_files=str(path), split="train", **options)
    if path.suffix in LOADERS or path.is_absolute() or str(dataset).startswith("."):
        raise FileNotFoundError(f"dataset is {str(dataset)!r}, but there is no such file")
    return load_dataset(str(dataset), split=split, streaming=True)


def pack(
    texts: AnyDataset, tokenizer: PreTrainedTokenizerBase, seq_length: int, text_column: str = "text"
) -> AnyDataset:
    """Tokenize documents and pack them into rows of at most ``seq_length`` tokens.

    Every document ends with the tokenizer's end-of-sequence token, where it has one. A row holds ``input_ids`` and
    ``position_ids``, which start again at 0 with each document: no thought looks into another document. The last
    row of every thousand documents may be shorter; only a row of a single token is dropped.

    Raises:
        ValueError: ``text_column`` is not a column, or ``seq_length`` is below 2.
    """
    if seq_length < 2:
        raise ValueError(f"seq_length is {seq_length}, but it must be at least 2")
    columns = texts.column_names or list(next(iter(texts), {text_column: None}))
    if text_column not in columns:
        raise ValueError(f"text_column is {text_column!r}, but the dataset has {', '.join(map(repr, columns))}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def rows(batch: dict[str, list]) -> dict[str, list[list[int]]]:
        documents = tokenizer(batch[text_column], add_special_tokens=True, verbose=False)["input_ids"]
        documents = [tokens if tokens[-1:] == end else tokens + end for tokens in documents]
        packed = list(_rows([tokens for tokens in documents if tokens], seq_length))
        return {"input_ids": [ids for ids, _ in packed], "position_ids": [positions for _, positions in packed]}

    return texts.map(rows, batched=True, batch_size=1000, remove_columns=columns)


def _rows(documents: list[list[int]], seq_length: int) -> Iterator[tuple[list[int], list[int]]]:
    ids: list[int] = []
    positions: list[int] = []
    for tokens in documents:
        while tokens:
            room = seq_length - len(ids)
            ids += tokens[:room]
            positions += range(min(room, len(tokens)))
            tokens = tokens[room:]
            if len(ids) == seq_length:
                yield ids, positions
                ids, positions = [], []
    if len(ids) > 1:
        yield ids, positions


@dataclass
class PadRight:
    """Collate rows of ``input_ids``, and ``position_ids`` or ``labels`` where they have them, padded on the right."""

    pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        fills = {"input_ids": self.pad_token_id, "position_ids": 0, "labels": IGNORED, "attention_mask": 0}
        length = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in dict.fromkeys([*rows[0], "attention_mask"]):
            if name not in fills:
                raise ValueError(f"rows hold {name!r}, but they must hold {', '.join(map(repr, fills))} only")
            batch[name] = torch.full((len(rows), length), fills[name])
            for i, row in enumerate(rows):
                values = row.get(name, [1] * len(row["input_ids"]) if name == "attention_mask" else None)
                if values is None:
                    raise ValueError(f"row {i} of the batch lacks {name!r}, which others have")
                batch[name][i, : len(values)] = torch.as_tensor(values)
        return batch
