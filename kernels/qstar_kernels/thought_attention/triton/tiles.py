"""Tiles of the attention kernels: ``rows`` are query rows, ``keys`` are keys, in ``tiles.json``."""

from pathlib import Path

import torch

from qstar_kernels.common.launch import Tile
from qstar_kernels.common.tile_table import TileTable

KERNELS = ("forward", "query_gradient", "text_gradient", "own_gradient", "step")
HOPPER_KERNELS = ("hopper_forward", "hopper_query_gradient", "hopper_text_gradient")  # instead, where the table says so
WIDTHS = (64, 128, 256)  # an entry of the table serves every width up to its own

TABLE = TileTable(Path(__file__).with_name("tiles.json"))


def find_tile(kernel: str, architecture: str, dtype: torch.dtype, width: int) -> Tile:
    return TABLE.find(kernel, architecture, dtype, width)
