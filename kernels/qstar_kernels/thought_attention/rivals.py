"""Kernels for one card, in the place of those that every card has: where tuning has found them faster.

The only door to the kernels in Gluon. The committed table of tiles asks for none, and nothing of theirs is imported.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from qstar_kernels.common.launch import Tile
from qstar_kernels.common.notices import warn_once
from qstar_kernels.common.tile_table import TileTable


def find_gluon(
    table: TileTable, kernel: str, architecture: str, dtype: torch.dtype, width: int
) -> tuple[ModuleType, Tile] | None:
    """The launches of the Gluon kernels and a tile, if ``table`` asks for one in ``kernel``'s place."""
    tile = table.find_special(f"hopper_{kernel}", architecture, dtype, width)
    if tile is None:
        return None
    launches = _gluon_launches()
    if isinstance(launches, Exception):
        warn_once(f"kernels in Triton run in the place of those in Gluon that the table asks for: {launches!r}")
        return None
    return launches, tile


@functools.cache
def _gluon_launches() -> ModuleType | Exception:
    """The module, or the exception of its import: to try again would take as long at every call."""
    try:
        from qstar_kernels.thought_attention.gluon import launches
    except Exception as error:
        return error
    return launches
