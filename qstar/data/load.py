"""The documents that a name, a path or an object of ``datasets`` stands for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qstar.data.files import DOCUMENTS, SUFFIXES, load_file

AnyDataset: TypeAlias = Dataset | IterableDataset


def load_texts(
    dataset: str | Path | AnyDataset | DatasetDict | IterableDatasetDict,
    split: str = "train",
    *,
    config: str | None = None,
    documents: str = "paragraph",
    columns: Iterable[str] | None = None,
    name: str = "dataset",
) -> AnyDataset:
    """The documents that ``dataset`` names. A file or a folder looks nothing up on the network.

    Args:
        dataset: a hub name (streamed), a ``.txt``, ``.jsonl``, ``.json`` or ``.parquet`` file, all in UTF-8, a folder
            that ``datasets`` reads, or an object of ``datasets``.
        split: the split of a hub dataset, of a folder or of a dictionary of datasets; of anything else the defaults
            ``"train"`` and ``"test"`` both stand for all of it.
        config: the configuration of a hub dataset or of a folder.
        documents: what is one document in a ``.txt`` file: a ``"paragraph"``, a ``"line"`` or the whole ``"file"``.
        columns: of a JSON file: to keep, which must hold text or chats; None for those of the first row, unchecked.
        name: what errors call ``dataset``.

    Raises:
        FileNotFoundError: it is no file and no folder, and no name that the hub has or could have.
        ValueError: a file of another kind, or one that cannot be read, with the place; a split that is not there.
        TypeError: something else.
    """
    if documents not in DOCUMENTS:
        raise ValueError(f"documents is {documents!r}, but it must be {', '.join(map(repr, DOCUMENTS))}")
    whole = isinstance(dataset, (Dataset, IterableDataset))
    is_path = isinstance(dataset, (str, Path))
    if config is not None and (not is_path or Path(dataset).is_file()):
        raise ValueError(f"the configuration of {name} is {config!r}, but only a hub dataset or a folder has some")
    if split not in ("train", "test") and (whole or (is_path and Path(dataset).is_file())):
        raise ValueError(f"the split of {name} is {split!r}, but a file or a single dataset has no splits")
    if whole:
        return dataset
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        if split not in dataset:
            raise ValueError(f"split is {split!r}, but {name} has {', '.join(map(repr, dataset))}")
        return dataset[split]
    if not isinstance(dataset, (str, Path)):
        raise TypeError(f"{name} must be a name, a path or a datasets object, but it is {type(dataset).__name__}")
    path = Path(dataset)
    if path.is_dir():
        return _load_folder(path, split, config, name)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{name} is {str(path)!r}, but a file must end in {', '.join(SUFFIXES)}")
        return load_file(path, documents, columns, name)
    check_name(dataset, name)
    try:
        return load_dataset(str(dataset), config, split=split, streaming=True)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{name} is {str(dataset)!r}, but there is no such file or folder here, and on the hub: {error}"
        ) from error


def check_name(value: str | Path, name: str) -> None:
    """Refuse what does not exist here and is written like a path, or could be no name on the hub.

    Raises:
        FileNotFoundError: it is one of them; ``name`` is what the error calls it.
    """
    text = str(value)
    if Path(text).exists():
        return
    if isinstance(value, Path) or text.startswith((".", "/", "~")) or Path(text).suffix in SUFFIXES:
        raise FileNotFoundError(f"{name} is {text!r}, but there is no such file or folder")
    try:
        validate_repo_id(text)
    except HFValidationError:
        raise FileNotFoundError(
            f"{name} is {text!r}, but there is no such file or folder here, and it could be no name on the hub"
        ) from None


def _load_folder(path: Path, split: str, config: str | None, name: str) -> AnyDataset:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():  # of save_to_disk
        return load_texts(load_from_disk(str(path)), split, config=config, name=name)
    return load_dataset(str(path.resolve()), config, split=split, streaming=True)
