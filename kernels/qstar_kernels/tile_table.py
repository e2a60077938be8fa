"""Tables of tiles: data in a JSON file beside the kernels, by architecture, dtype and width.

    {architecture: {"16" or "32" bits: {kernel: {largest width served: [rows, keys, warps, stages]}}}}

A table is written by hand or by ``python -m qstar_kernels.tune``; nothing is tried out at run time, so that every
process of a run makes the same choice and a repeated step gives the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch

from qstar_kernels.launch import Tile

# Cards with as much shared memory as sm_100 and its kind of tensor cores, and those with as much as sm_80.
LIKE_SM_100 = ("sm_101", "sm_103", "sm_110")
LIKE_SM_80 = ("sm_87",)

Entries = dict[str, dict[str, dict[str, dict[str, list[int]]]]]


class TileTable:
    """The tiles in the file ``path``, which is read when the first is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._tried: dict[str, Tile | None] = {}

    @cached_property
    def entries(self) -> Entries:
        return json.loads(self.path.read_text())

    def find(self, kernel: str, architecture: str, dtype: torch.dtype, width: int) -> Tile:
        """The tile of ``kernel`` for rows of ``width`` values; an unknown card has that of the one it is nearest to."""
        if kernel in self._tried:
            return self._tried[kernel]
        by_dtype = self.entries.get(architecture) or self.entries[nearest(architecture)]
        by_width = by_dtype[dtype_class(dtype)][kernel]
        return Tile(*by_width[str(min(limit for limit in map(int, by_width) if width <= limit))])

    def find_special(self, kernel: str, architecture: str, dtype: torch.dtype, width: int) -> Tile | None:
        """The tile of a kernel that serves one card and some widths only, or None where another has to do."""
        if kernel in self._tried:
            return self._tried[kernel]
        by_width = self.entries.get(architecture, {}).get(dtype_class(dtype), {}).get(kernel, {})
        return Tile(*by_width[str(width)]) if str(width) in by_width else None

    @contextmanager
    def trying(self, kernel: str, tile: Tile | None) -> Iterator[None]:
        """Inside, ``kernel`` has ``tile`` whatever the table says: for tuning and for looking at a tile's resources.

        None takes a special kernel out of use.
        """
        before = dict(self._tried)
        self._tried[kernel] = tile
        try:
            yield
        finally:
            self._tried = before


def dtype_class(dtype: torch.dtype) -> str:
    """The bits of an element, which is all of a dtype that matters to a tile."""
    return str(8 * dtype.itemsize)


def nearest(architecture: str) -> str:
    """The architecture of the tables that an unknown one is most like, never one with more shared memory.

    sm_86 stands for every card with 100 KB of it: sm_89, sm_120, and whatever is not known here.
    """
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture in LIKE_SM_100:
        return "sm_100"
    return "sm_80" if architecture in LIKE_SM_80 else "sm_86"


def format_table(entries: Entries) -> str:
    """JSON with a line for each kernel."""
    blocks = []
    for architecture, by_dtype in entries.items():
        classes = []
        for bits, kernels in by_dtype.items():
            lines = ",\n".join(f'      "{kernel}": {json.dumps(by_width)}' for kernel, by_width in kernels.items())
            classes.append(f'    "{bits}": {{\n{lines}\n    }}')
        blocks.append(f'  "{architecture}": {{\n' + ",\n".join(classes) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
