"""Tables of tiles: data in a JSON file beside the kernels, by architecture, dtype and width.

    {architecture: {
        "source": where its tiles come from, but for those in "measured",
        "measured": {"kernel, bits, largest width served": {"card", "torch", "triton", "date"}},
        "16" or "32" bits: {kernel: {largest width served: [rows, keys, warps, stages]}},
    }}

A table is written by hand or by ``python -m qstar_kernels.tools.tune``, which says what it measured. Nothing is tried
out at run time, so that every process of a run makes the same choice and a repeated step gives the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qstar_kernels.common.launch import Tile

# Cards with as much shared memory as sm_100 and its kind of tensor cores, and those with as much as sm_80.
LIKE_SM_100 = ("sm_101", "sm_103", "sm_110")
LIKE_SM_80 = ("sm_87",)

BITS = ("16", "32")

Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Measured:
    """What timed a tile: the card's name, the versions of torch and Triton, and the day, as 2026-01-31."""

    card: str
    torch: str
    triton: str
    date: str

    def __str__(self) -> str:
        return f"measured on {self.card} with torch {self.torch} and Triton {self.triton}, {self.date}"


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
        tried = self._tried.get(kernel)
        if tried is not None:
            return tried
        by_width = self.of(architecture)[dtype_class(dtype)][kernel]
        return Tile(*by_width[limit_of(by_width, width)])

    def find_special(self, kernel: str, architecture: str, dtype: torch.dtype, width: int) -> Tile | None:
        """The tile of a kernel that serves one card and some widths only, or None where another has to do."""
        if kernel in self._tried:
            return self._tried[kernel]
        by_width = self.entries.get(architecture, {}).get(dtype_class(dtype), {}).get(kernel, {})
        return Tile(*by_width[str(width)]) if str(width) in by_width else None

    def of(self, architecture: str) -> dict[str, Any]:
        """The entries of an architecture, or of the one that it is nearest to."""
        return self.entries.get(architecture) or self.entries[nearest(architecture)]

    def source(self, kernel: str, architecture: str, dtype: torch.dtype, width: int) -> str | Measured:
        """Where the tile that :meth:`find` or :meth:`find_special` gives comes from."""
        if kernel in self._tried:
            return "on trial"
        entries, bits = self.of(architecture), dtype_class(dtype)
        measured = entries.get("measured", {}).get(measured_key(kernel, bits, limit_of(entries[bits][kernel], width)))
        return entries["source"] if measured is None else Measured(**measured)

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


def limit_of(by_width: dict[str, list[int]], width: int) -> str:
    """The key of the entry that serves ``width``."""
    return str(min(limit for limit in map(int, by_width) if width <= limit))


def measured_key(kernel: str, bits: str, limit: int | str) -> str:
    """The name of an entry in an architecture's ``measured``."""
    return f"{kernel}, {bits}, {limit}"


def note_measured(entries: dict[str, Any], key: str, measured: Measured | None) -> None:
    """Say in the entries of an architecture what measured one of them; None takes it out."""
    noted = entries.pop("measured", {})
    noted.pop(key, None)
    if measured is not None:
        noted[key] = asdict(measured)
    if noted:
        entries["measured"] = dict(sorted(noted.items()))


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
    """JSON with a line for each kernel and each measurement."""
    blocks = []
    for architecture, of_card in entries.items():
        parts = [f'    "source": {json.dumps(of_card["source"])}']
        for name in ("measured", *BITS):
            if name in of_card:
                lines = ",\n".join(f'      "{key}": {json.dumps(value)}' for key, value in of_card[name].items())
                parts.append(f'    "{name}": {{\n{lines}\n    }}')
        blocks.append(f'  "{architecture}": {{\n' + ",\n".join(parts) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
