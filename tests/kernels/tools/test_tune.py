"""How the tuning command chooses, by a made-up clock, and what it compares to tell a right tile from a wrong one."""

import datetime
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import astuple, replace
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
tune = import_module("qstar_kernels.tools.tune")
tile_table = import_module("qstar_kernels.common.tile_table")
launch = import_module("qstar_kernels.common.launch")
Tile, Launch = launch.Tile, launch.Launch

ATTENTION, HEAD = (tune.PROVIDERS[op] for op in ("thought_attention", "lm_head"))
PRESENT = Tile(64, 32, 8, 2)
CARD = tile_table.Measured("a card", "2.13.0", "3.7.1", "2026-01-31")
ON_GPU = torch.cuda.is_available()


def test_candidates_are_the_present_tile_and_its_neighbours():
    found = ATTENTION.candidates(PRESENT)
    assert found[0] == PRESENT and len(found) == len(set(found))
    assert {Tile(128, 32, 8, 2), Tile(32, 32, 4, 2), Tile(64, 16, 8, 3)} <= set(found)
    assert Tile(128, 64, 4, 2) not in found
    assert all(
        min(tile.rows, tile.keys) >= 16 and tile.stages >= 1 for tile in ATTENTION.candidates(Tile(16, 16, 4, 1))
    )


@pytest.mark.parametrize(
    "keys, columns",
    [(1024, {256, 512, 1024, 2048, 4096}), (128, {128, 256, 512}), (8192, {2048, 4096, 8192, 16384}), (32, {32, 128})],
)
def test_candidates_of_the_head_are_rows_cut_otherwise(keys, columns):
    present = Tile(1, keys, 4, 1)
    found = HEAD.candidates(present)
    assert found[0] == present and len(found) == len(set(found))
    assert {tile.keys for tile in found} == columns and {tile.warps for tile in found} == {1, 2, 4, 8, 16}
    assert {(tile.rows, tile.stages) for tile in found} == {(1, 1)}
    assert all(tile.keys <= 4096 * tile.warps for tile in found)


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
    asked = []

    def right(tile):
        asked.append(tile)
        return tile != wrong

    ranked = tune.rank(times, times.get)
    assert ranked == [(0.1, wrong), (0.9, fast), (0.99, close), (1.0, PRESENT)]
    assert tune.winner(ranked, PRESENT, right, 1.0) == fast
    assert asked == [wrong, fast]
    assert tune.winner(ranked[2:], PRESENT, right, 1.0) == PRESENT and asked == [wrong, fast]
    assert tune.winner(ranked[:3], PRESENT, right, float("inf")) == fast
    assert tune.winner(ranked[:1], PRESENT, right, float("inf")) == PRESENT
    assert tune.winner([], PRESENT, right, float("inf")) == PRESENT
    assert tune.winner(ranked, None, right, 0.9) is None


@pytest.mark.parametrize("op, kernel", [("thought_attention", "forward"), ("lm_head", "score")])
def test_a_kernel_is_tuned_with_the_tile_that_is_tried(monkeypatch, capsys, op, kernel):
    provider = tune.PROVIDERS[op]
    tried = []

    def measure(cases, workers):
        for case in cases:
            assert case.op == op
            yield case, tune.Resources(spilled=8 * (case.tile.warps == 4), shared=1)

    def time_launch(launch):
        tried.append(Tile(*astuple(launch.tile)))
        return 1000 / launch.tile.keys

    def table_tile():
        return provider.TABLE.find(kernel, "sm_90", torch.bfloat16, 128)

    present = table_tile()
    candidates = provider.candidates(present)
    widest = max(tile.keys for tile in candidates)
    wrong = next(tile for tile in candidates if tile.keys == widest and tile.warps != 4)
    build = provider.build_launch
    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "time_launch", time_launch)
    monkeypatch.setattr(provider, "build_launch", lambda *a, **k: build(*a, **k | {"device": "meta"}))
    monkeypatch.setattr(provider, "errors", lambda *a: (float("nan") if table_tile() == wrong else 1.0, 1.0))

    monkeypatch.setattr(provider, "rivals", lambda *a: {})
    winners = tune.tune_kernel(op, kernel, torch.bfloat16, provider.Shape(128), "sm_90")
    chosen = winners[kernel]
    assert winners.keys() == {kernel}
    assert tried == [tile for tile in candidates if tile.warps != 4]
    assert chosen.keys == widest > present.keys and chosen != wrong
    assert table_tile() == present
    assert "(the table's)" in capsys.readouterr().out


@pytest.mark.parametrize("speed, wins", [(0.5, True), (0.99, False)])
def test_a_rival_takes_the_place_of_a_kernel_if_it_is_faster(monkeypatch, speed, wins):
    tiles = ATTENTION.rivals("forward", "sm_90", torch.bfloat16, 128)["hopper_forward"]
    build = ATTENTION.build_launch

    def time(launch):
        return speed + (launch.tile != tiles[1]) / 1000 if launch.language == "gluon" else 1.0

    monkeypatch.setattr(tune, "measure", lambda cases, workers: [(case, tune.Resources(shared=1)) for case in cases])
    monkeypatch.setattr(ATTENTION, "candidates", lambda tile: [tile])
    monkeypatch.setattr(ATTENTION, "build_launch", lambda *a, **k: build(*a, **k | {"device": "meta"}))
    monkeypatch.setattr(ATTENTION, "errors", lambda *a: (1.0, 1.0))
    monkeypatch.setattr(tune, "time_launch", time)

    winners = tune.tune_kernel("thought_attention", "forward", torch.bfloat16, ATTENTION.Shape(128), "sm_90")
    present = ATTENTION.TABLE.find("forward", "sm_90", torch.bfloat16, 128)
    assert winners == {"forward": present, "hopper_forward": tiles[1] if wins else None}
    assert ATTENTION.rivals("forward", "sm_100", torch.bfloat16, 128) == {}
    assert ATTENTION.rivals("forward", "sm_90", torch.float32, 128) == {}
    assert ATTENTION.rivals("forward", "sm_90", torch.bfloat16, 96) == {}


def test_a_rival_joins_and_leaves_the_table(tmp_path):
    key = "hopper_forward", "16", 256
    entries = tune.with_winners(ATTENTION.TABLE.entries, "sm_90", {key: PRESENT}, CARD)
    path = tmp_path / "tiles.json"
    path.write_text(tile_table.format_table(entries))
    table = tile_table.TileTable(path)
    assert table.find_special("hopper_forward", "sm_90", torch.bfloat16, 256) == PRESENT
    assert table.find_special("hopper_forward", "sm_90", torch.bfloat16, 255) is None
    assert table.find_special("hopper_forward", "sm_90", torch.float32, 256) is None
    assert table.find_special("hopper_forward", "sm_103", torch.bfloat16, 256) is None
    with table.trying("hopper_forward", None):
        assert table.find_special("hopper_forward", "sm_90", torch.bfloat16, 256) is None
    assert tune.with_winners(entries, "sm_90", {key: None}, CARD) == ATTENTION.TABLE.entries


def test_the_table_is_written_after_every_kernel(tmp_path, monkeypatch, capsys):
    """What a run found is there when it is ended for time."""
    path = tmp_path / "tiles.json"

    def tune_kernel(op, kernel, *_):
        if kernel == "step":
            raise KeyboardInterrupt
        return {kernel: PRESENT}

    monkeypatch.setattr(tune, "INTERPRETED", False)
    monkeypatch.setattr(tune, "architecture_of", lambda _: "sm_90")
    monkeypatch.setattr(tune, "tune_kernel", tune_kernel)
    for name in ("is_available", "get_device_name", "empty_cache"):
        monkeypatch.setattr(tune.torch.cuda, name, lambda: "a card")
    command = ["tune", "--dtypes", "bfloat16", "--widths", "128", "--kernels", "forward", "step", "--write", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        tune.main()
    table = tile_table.TileTable(path)
    assert table.find("forward", "sm_90", torch.bfloat16, 128) == PRESENT
    today = datetime.date.today().isoformat()
    measured = tile_table.Measured("a card", torch.__version__, tune.triton.__version__, today)
    assert table.source("forward", "sm_90", torch.bfloat16, 128) == measured
    assert table.source("step", "sm_90", torch.bfloat16, 128) == ATTENTION.TABLE.entries["sm_90"]["source"]
    assert table.find("step", "sm_90", torch.bfloat16, 128) == ATTENTION.TABLE.find(
        "step", "sm_90", torch.bfloat16, 128
    )


def test_winners_join_the_table_of_their_card(tmp_path):
    entries = ATTENTION.TABLE.entries
    path = tmp_path / "tiles.json"
    path.write_text(tile_table.format_table(entries))
    assert tile_table.TileTable(path).entries == entries

    won = tune.with_winners(entries, "sm_89", {("forward", "16", 96): PRESENT}, CARD)
    path.write_text(tile_table.format_table(won))
    table = tile_table.TileTable(path)
    assert table.entries == won
    assert (
        table.find("forward", "sm_89", torch.float16, 96)
        == table.find("forward", "sm_89", torch.bfloat16, 65)
        == PRESENT
    )
    assert table.find("forward", "sm_89", torch.bfloat16, 97) == table.find("forward", "sm_86", torch.bfloat16, 97)
    assert table.find("forward", "sm_86", torch.bfloat16, 96) != PRESENT
    assert "sm_89" not in entries
    by_hand = entries["sm_86"]["source"]
    sources = [table.source("forward", "sm_89", dtype, 96) for dtype in (torch.bfloat16, torch.float32)]
    assert sources == [CARD, by_hand] and table.source("forward", "sm_89", torch.bfloat16, 97) == by_hand
    assert {table.source("forward", "sm_86", torch.bfloat16, width) for width in (64, 96, 256)} == {by_hand}


@pytest.mark.parametrize("op", tune.PROVIDERS)
def test_every_tile_of_the_tables_says_where_it_comes_from(op):
    table = tune.PROVIDERS[op].TABLE
    for architecture, entries in table.entries.items():
        assert entries.keys() <= {"source", "measured", *tile_table.BITS}
        assert entries["source"].startswith("set by hand")
        keys = {
            tile_table.measured_key(kernel, bits, width)
            for bits in tile_table.BITS
            for kernel, by_width in entries[bits].items()
            for width in by_width
        }
        assert entries.get("measured", {}).keys() <= keys
        for kernel in tune.PROVIDERS[op].KERNELS:
            source = table.source(kernel, architecture, torch.bfloat16, 64)
            assert source == entries["source"] or isinstance(source, tile_table.Measured)
    assert table.path.read_text() == tile_table.format_table(table.entries)


def test_a_winner_of_the_head_serves_every_width(tmp_path):
    won = Tile(1, 8192, 16, 1)
    winners = {("score", "16", HEAD.largest_served(4096)): won}
    path = tmp_path / "tiles.json"
    path.write_text(tile_table.format_table(tune.with_winners(HEAD.TABLE.entries, "sm_90", winners, CARD)))
    table = tile_table.TileTable(path)
    assert all(table.find("score", "sm_90", torch.bfloat16, width) == won for width in (1, 4096, 4097, 128_256))
    assert all(table.find("score", "sm_90", torch.float32, width) != won for width in (1, 4096, 128_256))
    cards = table.entries.values()
    kernels = [kernel for card in cards for bits in tile_table.BITS for kernel in card[bits].values()]
    assert {width for kernel in kernels for width in kernel} == {str(HEAD.largest_served(1))}


@pytest.mark.parametrize(
    "architecture, like",
    [("sm_89", "sm_86"), ("sm_120", "sm_86"), ("sm_87", "sm_80"), ("sm_103", "sm_100"), ("gfx90a", "gfx942")],
)
def test_an_unknown_card_is_taken_for_one_with_no_more_shared_memory(architecture, like):
    assert tile_table.nearest(architecture) == like


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "qstar_kernels.tools.tune"], capture_output=True, text=True)
    assert done.returncode == 2 and "needs a GPU" in done.stderr


def test_the_options_are_those_of_the_op():
    default = tune.parse([])
    assert (default.op, default.batch, tuple(default.widths)) == ("thought_attention", 8, ATTENTION.WIDTHS)
    given = tune.parse(["--base-rows", "8", "--vocabulary", "1000", "--op", "lm_head", "--kernels", "draw", "mix"])
    assert (given.rows, given.base_rows, given.vocabulary, given.kernels) == (4096, 8, 1000, ["draw", "mix"])
    assert tuple(given.widths) == HEAD.WIDTHS and not hasattr(given, "heads")


@pytest.mark.parametrize(
    "given, complaint",
    [
        ("--rows 64", "not for --op thought_attention: --rows 64"),
        ("--op lm_head --heads 4", "not for --op lm_head: --heads 4"),
        ("--op lm_head --kernels forward", "invalid choice: 'forward'"),
        ("--op lm_head --widths 2048 4096", "lm_head's table has one entry for several of them"),
        ("--op mix", "invalid choice: 'mix'"),
    ],
)
def test_an_option_of_another_op_is_an_error(capsys, given, complaint):
    with pytest.raises(SystemExit) as stopped:
        tune.parse(given.split())
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


SMALL = {
    "thought_attention": ATTENTION.Shape(32, batch=1, positions=24, tokens=3, heads=2, kv_heads=1),
    "lm_head": HEAD.Shape(32, rows=5, base_rows=3, vocabulary=601),
}
COLUMNS = {"mix": 16, "mix_gradient": 16, "base_gradient": 16, "draw": 2}
KERNELS = [(op, kernel) for op, provider in tune.PROVIDERS.items() for kernel in provider.KERNELS]


def small_errors(monkeypatch, op, kernel, dtype):
    """Of ``kernel``, whose tile has two stages where that of the others has one."""
    provider, shape = tune.PROVIDERS[op], SMALL[op]
    monkeypatch.setattr(provider, "small_shape", lambda width: shape._replace(width=width))
    with ExitStack() as stack:
        for other in provider.KERNELS:
            tile = Tile(1, COLUMNS.get(other, 256), 4, 1) if provider is HEAD else Tile(64, 32, 4, 1)
            stack.enter_context(provider.TABLE.trying(other, replace(tile, stages=1 + (other == kernel))))
        return provider.errors(kernel, dtype, shape.width, "cuda" if ON_GPU else "cpu")


@pytest.mark.parametrize("dtype", tune.DTYPES)
@pytest.mark.parametrize("op, kernel", KERNELS)
def test_a_right_tile_is_about_as_exact_as_torch(monkeypatch, op, kernel, dtype):
    ours, torchs = small_errors(monkeypatch, op, kernel, getattr(torch, dtype))
    assert 0 < ours <= tune.WORST * torchs


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("op, kernel", KERNELS)
def test_a_tile_that_misses_a_row_is_wrong(monkeypatch, poisoned, op, kernel):
    run, cut = Launch.run, set()

    def run_with_the_last_program_missing(self):
        if self.tile.stages == 2:
            cut.add(self.kernel)
            self = replace(self, programs=self.programs - 1)
        run(self)

    monkeypatch.setattr(Launch, "run", run_with_the_last_program_missing)
    ours, torchs = small_errors(monkeypatch, op, kernel, torch.float32)
    assert len(cut) == 1 and not ours <= tune.WORST * torchs


def test_one_token_drawn_wrongly_is_wrong(monkeypatch):
    draw = HEAD.Draws.draw

    def draw_one_wrongly(self, y, first_row):
        tokens, log_prob = draw(self, y, first_row)
        tokens[-1] ^= 1
        return tokens, log_prob

    monkeypatch.setattr(HEAD.Draws, "draw", draw_one_wrongly)
    ours, torchs = small_errors(monkeypatch, "lm_head", "draw", torch.float32)
    assert ours > tune.WORST * torchs
