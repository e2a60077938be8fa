"""``python -m qstar_kernels.tune``: time tiles near those of a table on the GPU at hand, and say which is fastest.

A tile takes part if it compiles, fits the card, spills nothing and is right. ``--op`` says whose table it is, and with
that which options there are. ``--write FILE`` writes the table with the winners in it; a person looks at it, times a
whole training step with it, and copies it over the package's own.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from triton.testing import do_bench

from qstar_kernels.launch import TARGETS, Launch, Tile, architecture_of
from qstar_kernels.primitives import INTERPRETED
from qstar_kernels.resources import DTYPES, PROVIDERS, SHARED_LIMITS, Case, Resources, measure
from qstar_kernels.tile_table import Entries, dtype_class, format_table, nearest

MARGIN = 0.98  # a tile within 2 % of the table's does not replace it: two runs differ by as much
Ranked = list[tuple[float, Tile]]  # milliseconds and tile
WORST = 4.0  # times the error of the torch backend, both against float64


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


def with_winners(entries: Entries, architecture: str, winners: dict[tuple[str, str, int], Tile | None]) -> Entries:
    """The table with ``{(kernel, bits, largest width served): tile}``; a card that it lacks starts from its nearest.

    None takes an entry out.
    """
    entries = copy.deepcopy(entries)
    if architecture not in entries:
        entries[architecture] = copy.deepcopy(entries[nearest(architecture)])
    for (kernel, bits, width), tile in winners.items():
        by_width = entries[architecture][bits].pop(kernel, {})
        by_width.pop(str(width), None)
        if tile is not None:
            by_width[str(width)] = [tile.rows, tile.keys, tile.warps, tile.stages]
        if by_width:
            entries[architecture][bits][kernel] = dict(sorted(by_width.items(), key=lambda item: int(item[0])))
    return entries


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, what is allocated without a value holds NaN: a tile that leaves results unwritten is wrong."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def time_launch(launch: Launch) -> float:
    """Median milliseconds, the caches flushed before each run."""
    return do_bench(launch.run, warmup=25, rep=100, return_mode="median")


def rank_tiles(
    op: str, kernel: str, tiles: Sequence[Tile], dtype: torch.dtype, shape: NamedTuple, architecture: str
) -> Ranked:
    """The tiles of one kernel of ``op`` that fit, spill nothing and are right on its ``Shape``."""
    provider = PROVIDERS[op]
    target = architecture if architecture in TARGETS else nearest(architecture)

    def right(tile: Tile) -> bool:
        with provider.TABLE.trying(kernel, tile), poisoned():
            ours, torchs = provider.errors(kernel, dtype, shape.width, "cuda")
        return ours <= WORST * torchs

    def time(tile: Tile) -> float:
        with provider.TABLE.trying(kernel, tile):
            return time_launch(provider.build_launch(kernel, architecture, dtype, shape, device="cuda"))

    cases = [Case(op, kernel, target, name_of(dtype), shape.width, tile) for tile in tiles]
    fitting = [case.tile for case, found in measure(cases, os.cpu_count()) if fits(found, SHARED_LIMITS[target])]
    ranked = rank(fitting, time, right)
    shares = f"{len(ranked)} of {len(cases)} candidates ran and were right"
    print(f"\n{kernel}, {name_of(dtype)}, width {shape.width}: {shares}")
    return ranked


def tune_kernel(
    op: str, kernel: str, dtype: torch.dtype, shape: NamedTuple, architecture: str
) -> dict[str, Tile | None]:
    """The winner for one kernel of ``op`` on its ``Shape``, and for each rival its own if that is faster, else None.

    Prints the times of all that take part.
    """
    provider = PROVIDERS[op]
    present = provider.TABLE.find(kernel, architecture, dtype, shape.width)
    ranked = rank_tiles(op, kernel, provider.candidates(present), dtype, shape, architecture)
    winners = {kernel: winner(ranked, present)}
    show(ranked, present, winners[kernel])
    for rival, tiles in provider.rivals(kernel, architecture, dtype, shape.width).items():
        rivals = rank_tiles(op, rival, tiles, dtype, shape, architecture)
        faster = bool(rivals) and (not ranked or rivals[0][0] < MARGIN * ranked[0][0])
        winners[rival] = rivals[0][1] if faster else None
        show(rivals, None, winners[rival])
    return winners


def show(ranked: Ranked, present: Tile | None, chosen: Tile | None) -> None:
    for milliseconds, tile in ranked:
        notes = " (the table's)" * (tile == present) + " (chosen)" * (tile == chosen)
        print(f"{milliseconds:10.3f} ms  {tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}{notes}", flush=True)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, those of a shape as the fields of the op's ``Shape``."""
    program = "python -m qstar_kernels.tune"
    chooser = argparse.ArgumentParser(prog=program, add_help=False)
    chooser.add_argument("--op", choices=PROVIDERS, default="thought_attention")
    op = chooser.parse_known_args(given)[0].op
    provider = PROVIDERS[op]
    parser = argparse.ArgumentParser(prog=program, description=__doc__, parents=[chooser])
    for field, default in provider.Shape._field_defaults.items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--widths", nargs="+", type=int, default=provider.WIDTHS)
    parser.add_argument("--kernels", nargs="+", choices=provider.KERNELS, default=provider.KERNELS)
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table with the winners")
    arguments, unknown = parser.parse_known_args(given)
    if unknown:
        parser.error(f"not for --op {op}: {' '.join(unknown)}")
    if len({provider.largest_served(width) for width in arguments.widths}) < len(arguments.widths):
        parser.error(f"--widths {' '.join(map(str, arguments.widths))}: {op}'s table has one entry for several of them")
    return arguments


def main() -> int:
    arguments = parse()
    provider = PROVIDERS[arguments.op]
    if not torch.cuda.is_available() or INTERPRETED:
        why = "TRITON_INTERPRET is set" if INTERPRETED else "torch.cuda.is_available() is False"
        print(f"tuning needs a GPU: {why}", file=sys.stderr)
        return 2

    architecture = architecture_of(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()} ({architecture})")
    winners = {}
    for dtype, width, kernel in product(arguments.dtypes, arguments.widths, arguments.kernels):
        kind = getattr(torch, dtype)
        shape = provider.Shape(width, **{field: getattr(arguments, field) for field in provider.Shape._field_defaults})
        key = dtype_class(kind), provider.largest_served(width)
        found = tune_kernel(arguments.op, kernel, kind, shape, architecture)
        winners |= {(name, *key): tile for name, tile in found.items()}
        torch.cuda.empty_cache()
    if arguments.write:
        arguments.write.write_text(format_table(with_winners(provider.TABLE.entries, architecture, winners)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
