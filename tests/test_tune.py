"""How the tuning command chooses; a made-up clock stands in for the GPU."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
tune = import_module("qstar_kernels.tune")
tile_table = import_module("qstar_kernels.tile_table")
Tile = import_module("qstar_kernels.launch").Tile

PRESENT = Tile(64, 32, 8, 2)


def test_candidates_are_the_present_tile_and_its_neighbours():
    found = tune.candidates(PRESENT)
    assert found[0] == PRESENT and len(found) == len(set(found))
    assert {Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 16, 8, 3)} <= set(found)
    assert Tile(128, 64, 4, 2) not in found
    assert all(min(tile.rows, tile.keys) >= 16 and tile.stages >= 1 for tile in tune.candidates(Tile(16, 16, 4, 1)))


@pytest.mark.parametrize(
    "found, fit",
    [
        ({"shared": 1000}, True),
        ({"shared": 1001}, False),
        ({"spilled": 8}, False),
        ({"error": "exit code 134"}, False),
    ],
)
def test_what_spills_or_does_not_fit_takes_no_part(found, fit):
    assert tune.fits(tune.Resources(**found), limit=1000) is fit


def test_the_fastest_that_is_right_wins_by_a_margin():
    fast, wrong, close = Tile(128, 32, 8, 2), Tile(16, 32, 8, 2), Tile(64, 16, 8, 2)
    times = {PRESENT: 1.0, fast: 0.9, wrong: 0.1, close: 0.99}
    ranked = tune.rank(times, times.get, lambda tile: tile != wrong)
    assert ranked == [(0.9, fast), (0.99, close), (1.0, PRESENT)]
    assert tune.winner(ranked, PRESENT) == fast
    assert tune.winner(ranked[1:], PRESENT) == PRESENT
    assert tune.winner(ranked[:2], PRESENT) == fast
    assert tune.winner([], PRESENT) == PRESENT


def test_a_kernel_is_tuned_with_the_tile_that_is_tried(monkeypatch, capsys):
    attention = tune.attention
    tried = []

    def measure(cases, workers):
        for case in cases:
            yield case, tune.Resources(spilled=8 * (case.tile.warps == 4), shared=1)

    def time_launch(launch):
        tried.append(launch.tile)
        return 1000 / launch.tile.rows

    build = attention.build_launch
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "time_launch", time_launch)
    monkeypatch.setattr(attention, "build_launch", lambda *a, **k: build(*a, **k | {"device": "meta"}))
    monkeypatch.setattr(attention, "errors", lambda *a: (float("nan") if attention_tile().keys == 16 else 1.0, 1.0))

    def attention_tile():
        return attention.TABLE.find("forward", "sm_90", torch.bfloat16, 128)

    present = attention_tile()
    chosen = tune.tune_kernel("forward", torch.bfloat16, attention.Shape(128), "sm_90")
    assert chosen.rows == 2 * present.rows and chosen.warps == 8
    assert {tile.rows for tile in tried} == {present.rows // 2, present.rows, 2 * present.rows}
    assert all(tile.warps == 8 and tile.keys > 16 for tile in tried)
    assert attention_tile() == present
    assert "(the table's)" in capsys.readouterr().out


def test_winners_join_the_table_of_their_card(tmp_path):
    entries = tune.attention.TABLE.entries
    path = tmp_path / "tiles.json"
    path.write_text(tile_table.format_table(entries))
    assert tile_table.TileTable(path).entries == entries

    path.write_text(tile_table.format_table(tune.with_winners(entries, "sm_89", {("forward", "16", 96): PRESENT})))
    table = tile_table.TileTable(path)
    assert (
        table.find("forward", "sm_89", torch.float16, 96)
        == table.find("forward", "sm_89", torch.bfloat16, 65)
        == PRESENT
    )
    assert table.find("forward", "sm_89", torch.bfloat16, 97) == table.find("forward", "sm_86", torch.bfloat16, 97)
    assert table.find("forward", "sm_86", torch.bfloat16, 96) != PRESENT
    assert "sm_89" not in entries


@pytest.mark.parametrize(
    "architecture, like",
    [("sm_89", "sm_86"), ("sm_120", "sm_86"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("gfx90a", "gfx942")],
)
def test_an_unknown_card_is_taken_for_one_with_no_more_shared_memory(architecture, like):
    assert tile_table.nearest(architecture) == like


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "qstar_kernels.tune"], capture_output=True, text=True)
    assert done.returncode == 2 and "needs a GPU" in done.stderr
