"""Text from a hub name, a local file or a ``datasets`` object, packed into rows of tokens."""

from qstar.data.collate import PadRight
from qstar.data.load import AnyDataset, load_texts
from qstar.data.pack import pack
from qstar.data.settings import DataSettings, read_rows, read_texts

__all__ = ["AnyDataset", "DataSettings", "PadRight", "load_texts", "pack", "read_rows", "read_texts"]
