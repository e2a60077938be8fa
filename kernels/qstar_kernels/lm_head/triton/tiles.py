"""How the head's kernels are cut, in ``tiles.json``: one row at a time, ``keys`` columns of it at once."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qstar_kernels.common.launch import Tile
from qstar_kernels.common.tile_table import TileTable

KERNELS = ("mix", "mix_gradient", "base_gradient", "score", "gradient", "weigh_tiles", "draw")
WIDTHS = (4096,)  # of the model; the table's entries serve any
ANY_WIDTH = 2**31 - 1  # of the model, or of a row of logits: the one key of every kernel's entries

TABLE = TileTable(Path(__file__).with_name("tiles.json"))


@dataclass(frozen=True)
class RowTile(Tile):
    """A program has one row."""

    @property
    def constants(self) -> dict[str, int]:
        return {"COLUMNS": self.keys}


def find_tile(kernel: str, architecture: str, dtype: torch.dtype, width: int) -> RowTile:
    return RowTile(**asdict(TABLE.find(kernel, architecture, dtype, width)))
