"""How text is read: each setting once, for the flags of ``qstar train`` and ``qstar eval`` and for Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qstar.config import setting
from qstar.data.documents import format_columns
from qstar.data.files import DOCUMENTS
from qstar.data.load import AnyDataset, load_texts
from qstar.data.pack import check_targets, pack


@dataclass(kw_only=True)
class DataSettings:
    """How text is read.

    Attributes:
        seq_length: N, text tokens in a row.
        text_column: the column that holds the text, or chats as lists of messages with ``role`` and ``content``.
        text_format: a text made of columns, as in ``"Q: {question}\\nA: {answer}"``, in the place of ``text_column``.
        documents: what is one document in a ``.txt`` file: ``"paragraph"``, ``"line"`` or ``"file"``.
        dataset_config: the configuration of a hub dataset.
    """

    seq_length: int = setting(256, "N: text tokens in a row.")
    text_column: str = setting("text", "The column that holds the text, or chats as lists of messages.")
    text_format: str | None = setting(
        None, 'A text made of columns, as in "{question} {answer}", in the place of --text_column.'
    )
    documents: str = setting("paragraph", "What is one document in a .txt file.", choices=list(DOCUMENTS))
    dataset_config: str | None = setting(None, "Configuration of a hub dataset.")

    def check_data(self) -> None:
        """Raise ValueError for a wrong value."""
        if isinstance(self.seq_length, bool) or not isinstance(self.seq_length, int) or self.seq_length < 2:
            raise ValueError(f"seq_length is {self.seq_length!r}, but it must be an integer of at least 2")
        if self.documents not in DOCUMENTS:
            raise ValueError(f"documents is {self.documents!r}, but it must be {', '.join(map(repr, DOCUMENTS))}")
        if self.text_format is None:
            return
        if self.text_column != "text":
            raise ValueError(f"text_format and text_column {self.text_column!r} are both given: give one of them")
        self.columns()

    def check_documents(self, *datasets: object) -> None:
        """Raise ValueError where ``documents`` is set, and none of ``datasets`` is a ``.txt`` file."""
        if self.documents != "paragraph" and not any(str(each).endswith(".txt") for each in datasets):
            raise ValueError(f"documents is {self.documents!r}, but only a .txt file is cut into documents by it")

    def columns(self) -> list[str]:
        """The columns that are read.

        Raises:
            ValueError: ``text_format`` is no format of columns.
        """
        if self.text_format is None:
            return [self.text_column]
        return format_columns(self.text_format)


def read_texts(
    dataset: str | Path | AnyDataset, split: str, settings: DataSettings, config: str | None, name: str = "dataset"
) -> AnyDataset:
    """The documents that ``dataset`` names, as the settings say; see :func:`qstar.data.load_texts`."""
    columns = settings.columns()
    return load_texts(dataset, split, config=config, documents=settings.documents, columns=columns, name=name)


def read_rows(
    texts: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings,
    dataset: str | Path | AnyDataset,
    name: str = "dataset",
) -> AnyDataset:
    """The texts that were read from ``dataset``, packed as the settings say and checked to hold something to predict.

    Raises:
        ValueError: they do not, see :func:`qstar.data.pack` as well.
    """
    source = str(dataset) if isinstance(dataset, (str, Path)) else name
    form = settings.text_format
    rows = pack(texts, tokenizer, settings.seq_length, settings.text_column, text_format=form, source=source)
    check_targets(rows, source)
    return rows
