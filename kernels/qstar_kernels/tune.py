"""``python -m qstar_kernels.tune``: time tiles near those of the tables on the GPU at hand, and say which is fastest.

A tile takes part if it compiles, fits the card, spills nothing and is right. ``--write FILE`` writes the table with the
winners in it; a person looks at it, times a whole training step with it, and copies it over the package's own.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import torch
from triton.testing import do_bench

from qstar_kernels.launch import TARGETS, Launch, Tile, architecture_of
from qstar_kernels.primitives import INTERPRETED
from qstar_kernels.resources import DTYPES, SHARED_LIMITS, Case, Resources, measure
from qstar_kernels.thought_attention import cases as attention
from qstar_kernels.tile_table import Entries, dtype_class, format_table, nearest

MARGIN = 0.98  # a tile within 2 % of the table's does not replace it: two runs differ by as much
Ranked = list[tuple[float, Tile]]  # milliseconds and tile
WORST = 4.0  # times the error of the torch backend, both against float64


def candidates(tile: Tile) -> list[Tile]:
    """``tile`` and those that differ from it by one step in at most two of its four numbers."""
    sizes = [[x // 2, x, 2 * x] for x in (tile.rows, tile.keys)]
    numbers = [*sizes, [4, 8], [tile.stages - 1, tile.stages, tile.stages + 1]]
    found = [tile]
    for rows, keys, warps, stages in product(*numbers):
        changed = (rows != tile.rows) + (keys != tile.keys) + (warps != tile.warps) + (stages != tile.stages)
        if 0 < changed <= 2 and min(rows, keys) >= 16 and stages >= 1:
            found.append(Tile(rows, keys, warps, stages))
    return found


def fits(found: Resources, limit: int) -> bool:
    return found.error is None and found.spilled == 0 and found.shared <= limit


def rank(tiles: Iterable[Tile], time: Callable[[Tile], float], right: Callable[[Tile], bool]) -> Ranked:
    """The tiles that are right, the fastest first."""
    return sorted(((time(tile), tile) for tile in tiles if right(tile)), key=lambda pair: pair[0])


def winner(ranked: Ranked, present: Tile) -> Tile:
    """The fastest, or ``present`` if it is about as fast or nothing ran."""
    times = {tile: time for time, tile in ranked}
    if not ranked or times.get(present, float("inf")) * MARGIN <= ranked[0][0]:
        return present
    return ranked[0][1]


def with_winners(entries: Entries, architecture: str, winners: dict[tuple[str, str, int], Tile]) -> Entries:
    """The table with ``{(kernel, dtype class, width): tile}``; a card that it lacks starts from its nearest."""
    entries = copy.deepcopy(entries)
    if architecture not in entries:
        entries[architecture] = copy.deepcopy(entries[nearest(architecture)])
    for (kernel, bits, width), tile in winners.items():
        by_width = entries[architecture][bits][kernel]
        by_width[str(width)] = [tile.rows, tile.keys, tile.warps, tile.stages]
        entries[architecture][bits][kernel] = dict(sorted(by_width.items(), key=lambda item: int(item[0])))
    return entries


def time_launch(launch: Launch) -> float:
    """Median milliseconds, the caches flushed before each run."""
    return do_bench(launch.run, warmup=25, rep=100, return_mode="median")


def tune_kernel(kernel: str, dtype: torch.dtype, shape: attention.Shape, architecture: str) -> Tile:
    """The winner for one kernel; prints the times of all that take part."""
    target = architecture if architecture in TARGETS else nearest(architecture)
    name = str(dtype).removeprefix("torch.")
    present = attention.TABLE.find(kernel, architecture, dtype, shape.width)

    def right(tile: Tile) -> bool:
        with attention.TABLE.trying(kernel, tile):
            ours, torchs = attention.errors(kernel, dtype, shape.width, "cuda")
        return ours <= WORST * torchs

    def time(tile: Tile) -> float:
        with attention.TABLE.trying(kernel, tile):
            return time_launch(attention.build_launch(kernel, architecture, dtype, shape, device="cuda"))

    cases = [Case("thought_attention", kernel, target, name, shape.width, tile) for tile in candidates(present)]
    fitting = [case.tile for case, found in measure(cases, os.cpu_count()) if fits(found, SHARED_LIMITS[target])]
    ranked = rank(fitting, time, right)
    chosen = winner(ranked, present)
    print(f"\n{kernel}, {name}, width {shape.width}: {len(ranked)} of {len(cases)} candidates ran and were right")
    for milliseconds, tile in ranked:
        notes = " (the table's)" * (tile == present) + " (chosen)" * (tile == chosen)
        print(f"{milliseconds:10.3f} ms  {tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}{notes}", flush=True)
    return chosen


def main() -> int:
    shape = attention.Shape._field_defaults
    parser = argparse.ArgumentParser(prog="python -m qstar_kernels.tune", description=__doc__)
    for option in ("batch", "positions", "tokens", "heads", "kv_heads"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=shape[option])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--widths", nargs="+", type=int, default=attention.WIDTHS)
    parser.add_argument("--kernels", nargs="+", choices=attention.KERNELS, default=attention.KERNELS)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table with the winners")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or INTERPRETED:
        why = "TRITON_INTERPRET is set" if INTERPRETED else "torch.cuda.is_available() is False"
        print(f"tuning needs a GPU: {why}", file=sys.stderr)
        return 2

    architecture = architecture_of(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()} ({architecture})")
    winners = {}
    for dtype, width, kernel in product(arguments.dtypes, arguments.widths, arguments.kernels):
        kind = getattr(torch, dtype)
        size = attention.Shape(width, **{option: getattr(arguments, option) for option in shape})
        winners[kernel, dtype_class(kind), width] = tune_kernel(kernel, kind, size, architecture)
        torch.cuda.empty_cache()
    if arguments.write:
        arguments.write.write_text(format_table(with_winners(attention.TABLE.entries, architecture, winners)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
