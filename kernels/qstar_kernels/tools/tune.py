"""``python -m qstar_kernels.tools.tune``: time tiles near those of a table on the GPU at hand, and say which win.

A tile takes part if it compiles, fits the card and spills nothing, and wins if it is right as well. ``--op`` says whose
table it is, and with that which options there are. ``--write FILE`` writes the table with the winners in it after every
kernel; a person looks at it, times a whole training step with it, and copies it over the package's own.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.testing import do_bench

from qstar_kernels.common.launch import TARGETS, Launch, Tile, architecture_of
from qstar_kernels.common.primitives import INTERPRETED
from qstar_kernels.common.tile_table import (
    Entries,
    Measured,
    dtype_class,
    format_table,
    measured_key,
    nearest,
    note_measured,
)
from qstar_kernels.tools.resources import DTYPES, PROVIDERS, SHARED_LIMITS, Case, Resources, measure

MARGIN = 0.98  # a tile within 2 % of the table's does not replace it: two runs differ by as much
Ranked = list[tuple[float, Tile]]  # milliseconds and tile
WORST = 4.0  # times the error of the torch backend, both against float64


def fits(found: Resources, limit: int) -> bool:
    return found.error is None and found.spilled == 0 and found.shared <= limit


def rank(tiles: Iterable[Tile], time: Callable[[Tile], float]) -> Ranked:
    """The tiles, the fastest first."""
    return sorted(((time(tile), tile) for tile in tiles), key=lambda pair: pair[0])


def winner(ranked: Ranked, present: Tile | None, right: Callable[[Tile], bool], to_beat: float) -> Tile | None:
    """The fastest that is right and beats ``to_beat`` milliseconds by a margin, or ``present`` if none does.

    Only those that could win are asked whether they are right: each that is has to be compiled once more.
    """
    faster = (tile for time, tile in ranked if time < to_beat * MARGIN)
    return next(filter(right, faster), present)


def with_winners(
    entries: Entries, architecture: str, winners: dict[tuple[str, str, int], Tile | None], measured: Measured
) -> Entries:
    """The table with ``{(kernel, bits, largest width served): tile}`` and what measured them.

    A card that it lacks starts from its nearest. None takes an entry out.
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
        note_measured(entries[architecture], measured_key(kernel, bits, width), measured if tile is not None else None)
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


def tune_kernel(
    op: str, kernel: str, dtype: torch.dtype, shape: NamedTuple, architecture: str
) -> dict[str, Tile | None]:
    """The winner for one kernel of ``op`` on its ``Shape``, and for each rival its own if that is faster, else None.

    A kernel of which nothing could be timed has no winner. Prints the times of all that take part.
    """
    provider = PROVIDERS[op]
    present = provider.TABLE.find(kernel, architecture, dtype, shape.width)
    entrants = {kernel: provider.candidates(present)} | provider.rivals(kernel, architecture, dtype, shape.width)
    winners: dict[str, Tile | None] = {}
    to_beat = float("inf")
    for name, tiles in entrants.items():
        ranked = rank_tiles(op, name, tiles, dtype, shape, architecture)
        times = {tile: time for time, tile in ranked}
        before = present if name == kernel else None
        to_beat = times.get(before, to_beat)
        chosen = winner(ranked, before, partial(is_right, op, name, dtype, shape.width), to_beat)
        if chosen is None or chosen in times:
            winners[name] = chosen
        to_beat = times.get(chosen, to_beat)
        print(f"\n{name}, {name_of(dtype)}, width {shape.width}: {len(ranked)} of {len(tiles)} candidates fit and ran")
        for milliseconds, tile in ranked:
            notes = " (the table's)" * (tile == before) + " (chosen)" * (tile == chosen)
            print(f"{milliseconds:10.3f} ms  {tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}{notes}", flush=True)
    return winners


def rank_tiles(
    op: str, kernel: str, tiles: Sequence[Tile], dtype: torch.dtype, shape: NamedTuple, architecture: str
) -> Ranked:
    """The tiles of one kernel of ``op`` that fit and spill nothing, by their time on its ``Shape``."""
    provider = PROVIDERS[op]
    target = architecture if architecture in TARGETS else nearest(architecture)

    def time(tile: Tile) -> float:
        with provider.TABLE.trying(kernel, tile):
            return time_launch(provider.build_launch(kernel, architecture, dtype, shape, device="cuda"))

    cases = [Case(op, kernel, target, name_of(dtype), shape.width, tile) for tile in tiles]
    fitting = [case.tile for case, found in measure(cases, os.cpu_count()) if fits(found, SHARED_LIMITS[target])]
    return rank(fitting, time)


def is_right(op: str, kernel: str, dtype: torch.dtype, width: int, tile: Tile) -> bool:
    """Whether a kernel with ``tile`` is about as exact as the torch backend."""
    provider = PROVIDERS[op]
    with provider.TABLE.trying(kernel, tile), poisoned():
        ours, torchs = provider.errors(kernel, dtype, width, "cuda")
    return ours <= WORST * torchs


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, those of a shape as the fields of the op's ``Shape``."""
    program = "python -m qstar_kernels.tools.tune"
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
    card = torch.cuda.get_device_name()
    measured = Measured(card, torch.__version__, triton.__version__, datetime.date.today().isoformat())
    print(f"{card} ({architecture})")
    winners = {}
    for dtype, width, kernel in product(arguments.dtypes, arguments.widths, arguments.kernels):
        kind = getattr(torch, dtype)
        shape = provider.Shape(width, **{field: getattr(arguments, field) for field in provider.Shape._field_defaults})
        key = dtype_class(kind), provider.largest_served(width)
        found = tune_kernel(arguments.op, kernel, kind, shape, architecture)
        winners |= {(name, *key): tile for name, tile in found.items()}
        torch.cuda.empty_cache()
        if arguments.write:
            table = with_winners(provider.TABLE.entries, architecture, winners, measured)
            arguments.write.write_text(format_table(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
