"""How many query-key pairs the attention kernels multiply for each that counts, by walking their tiles; no GPU needed.

    python -m lab.count_tiles [--architecture sm_90] [--hopper]

A tile of rows meets whole tiles of keys: at the diagonal of the text, and among the own keys, where each position sees
its own few, some of that is masked away. No kernel with these tiles can be nearer to the matrix rate than the inverse.
"""

from __future__ import annotations

import argparse
from math import ceil

import torch

from bench_thought_attention import GPU_CASES
from peers.attention_cases import Work
from qstar_kernels.common.launch import TARGETS, Tile
from qstar_kernels.testing import AttentionCase
from qstar_kernels.thought_attention.gluon.launches import TILES
from qstar_kernels.thought_attention.triton.tiles import find_tile


def pairs_by_rows(case: AttentionCase, tile: Tile) -> int:
    """Of the forward and of the query gradient, for each key/value head of a sequence."""
    group, own = case.heads // case.kv_heads, case.slots - 1
    count, pairs = case.positions * case.slots * group, 0
    for first in range(0, count, tile.rows):
        first_cell, last_cell = first // group, (min(first + tile.rows, count) - 1) // group
        first_position, last_position = first_cell // case.slots, last_cell // case.slots
        begin = (first_position * own + max(first_cell % case.slots - 1, 0)) // case.tokens * case.tokens
        end = last_position * own + last_cell % case.slots
        keys = max(ceil((end - begin) / tile.keys), 0) + ceil((last_position + 1) / tile.keys)
        pairs += keys * tile.keys * tile.rows
    return pairs


def pairs_by_text_keys(case: AttentionCase, tile: Tile) -> int:
    cells = case.slots * (case.heads // case.kv_heads)
    starts = range(0, case.positions, tile.keys)
    return sum(ceil((case.positions - start) * cells / tile.rows) * tile.rows * tile.keys for start in starts)


def pairs_by_own_keys(case: AttentionCase, tile: Tile) -> int:
    group, own, pairs = case.heads // case.kv_heads, case.slots - 1, 0
    for first in range(0, case.positions * own, tile.keys):
        last = min(first + tile.keys, case.positions * own) - 1
        seer = last // case.tokens * case.tokens + case.tokens - 1
        rows = (seer // own * case.slots + 1 + seer % own) - (first // own * case.slots + first % own)
        pairs += ceil(rows * group / tile.rows) * tile.rows * tile.keys
    return pairs


def hopper_pairs_by_rows(case: AttentionCase, tile: Tile) -> int:
    cells, size = case.positions * case.slots, tile.rows // (case.heads // case.kv_heads)
    pairs = 0
    for first in range(0, cells, size):
        last = min(first + size, cells) - 1
        begin = first - max(first % case.slots - 1, 0) % case.tokens
        keys = ceil((last + 1 - begin) / tile.keys) + ceil((last // case.slots + 1) / tile.keys)
        pairs += keys * tile.keys * tile.rows
    return pairs


def hopper_pairs_by_text_keys(case: AttentionCase, tile: Tile) -> int:
    """Each half of a tile of keys leaves out the rows before it."""
    cells, size = case.positions * case.slots, tile.rows // (case.heads // case.kv_heads)
    pairs = 0
    for first in range(0, case.positions, tile.keys):
        items = ceil((cells - first * case.slots) / size)
        for half in (0, tile.keys // 2):
            pairs += max(items - half * case.slots // size, 0) * tile.rows * tile.keys // 2
    return pairs


def count_pairs(case: AttentionCase, architecture: str, hopper: bool) -> tuple[int, int]:
    """Pairs that the forward multiplies, and products of pairs in the backward, for a key/value head of a sequence."""
    names = ("forward", "query_gradient", "text_gradient", "own_gradient")
    tiles = {name: find_tile(name, architecture, torch.bfloat16, case.width) for name in names}
    by_rows, by_text_keys = pairs_by_rows, pairs_by_text_keys
    if hopper:
        tiles |= {name: TILES[f"hopper_{name}"][case.width][0] for name in names[:3]}
        by_rows, by_text_keys = hopper_pairs_by_rows, hopper_pairs_by_text_keys
    by_keys = by_text_keys(case, tiles["text_gradient"]) + pairs_by_own_keys(case, tiles["own_gradient"])
    return by_rows(case, tiles["forward"]), 3 * by_rows(case, tiles["query_gradient"]) + 4 * by_keys


def main() -> None:
    parser = argparse.ArgumentParser(description="Pairs multiplied for each pair that counts, and a call's work.")
    parser.add_argument("--architecture", choices=TARGETS, default="sm_90")
    parser.add_argument("--hopper", action="store_true", help="the Hopper kernels, with the first of their tiles")
    options = parser.parse_args()
    print("| N | T | D | forward: TFLOP | GB | multiplied / counted | backward: multiplied / counted |")
    print("|---|---|---|---|---|---|---|")
    for case in GPU_CASES:
        if options.hopper and not all(case.width in by_width for by_width in TILES.values()):
            continue
        counted = case.pairs / (case.batch * case.kv_heads)
        forward, backward = count_pairs(case, options.architecture, options.hopper)
        ((flops, size),) = Work(case, "forward").phases(2)
        print(
            f"| {case.positions} | {case.tokens} | {case.width} | {flops / 1e12:.3f} | {size / 1e9:.3f} "
            f"| {forward / counted:.2f} | {backward / (5 * counted):.2f} |"  # of five products that count
        )


if __name__ == "__main__":
    main()
