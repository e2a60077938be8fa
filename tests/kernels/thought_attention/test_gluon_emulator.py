"""The emulator of Gluon finds the mistakes that it is there to find."""

import time
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qstar_kernels.thought_attention.gluon.ring import await_item, fill, make_ring, release, tile_of

emulator = import_module("gluon_emulator")
machine = import_module("gluon_machine")
launch = import_module("qstar_kernels.common.launch")

TILES, ROWS, WIDTH = 12, 16, 64


@gluon.jit
def produce(x, ring, tiles, ROWS: gl.constexpr):
    for tile in range(tiles):
        fill(ring, tile, x, None, [tile * ROWS, 0])


@gluon.jit
def consume(out, ring, tiles, MISTAKE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """out = the sum over tiles of x x^T."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    acc = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    for tile in range(tiles):
        if MISTAKE != "no wait":
            await_item(ring, tile)
        x_tile = tile_of(ring.tiles, tile, ROWS, WIDTH)
        if MISTAKE == "let go too early":
            release(ring, tile)
        if MISTAKE == "wrong phase":
            mbarrier.wait(ring.full.index(tile % ring.tiles.shape[0]), (tile // ring.tiles.shape[0] & 1) ^ 1)
        product = warpgroup_mma(x_tile, x_tile.permute([1, 0]), acc, is_async=MISTAKE == "product not awaited")
        if MISTAKE != "never let go" and MISTAKE != "let go too early":
            release(ring, tile)
        acc = product
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))
    far = 1 if MISTAKE == "beyond the end" else 0
    gl.store(out + far + (rows[:, None] * ROWS + columns[None, :]), acc)


@gluon.jit
def kernel(x, out, tiles, MISTAKE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    ring = make_ring(x, None, PLACES=2, WRITERS=1, READERS=1)
    fence_async_shared()
    gl.warp_specialize(
        [(consume, (out, ring, tiles, MISTAKE, ROWS, WIDTH)), (produce, (x, ring, tiles, ROWS))], [1], [24]
    )


@gluon.jit
def echo(x, out, MISTAKE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """out = 2 x by way of one place in shared memory."""
    ring = make_ring(x, None, PLACES=1, WRITERS=1, READERS=1)
    gl.warp_specialize([(echo_tiles, (x, out, ring, MISTAKE, ROWS, WIDTH)), (nothing, ())], [1], [24])


@gluon.jit
def nothing():
    pass


@gluon.jit
def echo_tiles(x, out, ring, MISTAKE: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for tile in range(12):
        fill(ring, tile, x, None, [tile * ROWS, 0])
        await_item(ring, tile)
        place = tile_of(ring.tiles, tile, ROWS, WIDTH)
        place.store(2 * place.load(LAYOUT))
        tma.async_copy_shared_to_global(out, [tile * ROWS, 0], place)
        if MISTAKE != "store not awaited":
            tma.store_wait(0)
        release(ring, tile)
    tma.store_wait(0)


def run(function, out, mistake):
    x = torch.randn(TILES * ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    layout = gl.NVMMASharedLayout.get_default_for([ROWS, WIDTH], gl.float32)
    arguments = {"x": TensorDescriptor(x, [*x.shape], [WIDTH, 1], [ROWS, WIDTH], layout), "out": out}
    if function is kernel:
        arguments["tiles"] = TILES
    else:
        arguments["out"] = TensorDescriptor(out, [*out.shape], [WIDTH, 1], [ROWS, WIDTH], layout)
    keywords = arguments | {"MISTAKE": mistake, "WIDTH": WIDTH}
    emulator.run(launch.Launch(function, 1, keywords, launch.Tile(ROWS, WIDTH, 4, 1)))
    return x


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(machine, "PATIENCE", 1.0)


def test_without_a_mistake_it_computes():
    out = torch.full((ROWS, ROWS), torch.nan)
    tiles = run(kernel, out, None).view(TILES, ROWS, WIDTH)
    torch.testing.assert_close(out, (tiles @ tiles.mT).sum(0), rtol=1e-5, atol=1e-4)
    out = torch.full((TILES * ROWS, WIDTH), torch.nan)
    assert torch.equal(2 * run(echo, out, None), out)


def is_right(mistake) -> bool:
    out = torch.full((ROWS, ROWS), torch.nan)
    try:
        tiles = run(kernel, out, mistake).view(TILES, ROWS, WIDTH)
    except machine.Mistake:  # as a place may be let go before it is full
        return False
    return torch.allclose(out, (tiles @ tiles.mT).sum(0), rtol=1e-2, atol=1e-2)


def test_a_place_read_before_it_is_full_is_found(monkeypatch):
    monkeypatch.setattr(emulator.Program, "pauses", 1.0)
    monkeypatch.setattr(emulator.Program, "pause", 0.02)
    assert not is_right("no wait")


def test_a_place_let_go_too_early_gives_a_wrong_result(monkeypatch):
    product = emulator.Product.compute

    def compute_late(self):
        time.sleep(0.01)
        product(self)

    monkeypatch.setattr(emulator.Product, "compute", compute_late)
    assert is_right(None) and not is_right("let go too early")


def test_a_store_that_is_not_awaited_gives_a_wrong_result():
    out = torch.full((TILES * ROWS, WIDTH), torch.nan)
    assert not torch.equal(2 * run(echo, out, "store not awaited"), out)


@pytest.mark.parametrize(
    "mistake, message",
    [
        ("never let go", "deadlock"),
        ("wrong phase", "deadlock"),
        ("beyond the end", "out of the tensor's memory"),
        ("product not awaited", "while a product may read it"),
    ],
)
def test_a_mistake_is_told(mistake, message):
    with pytest.raises(machine.Mistake, match=message):
        run(kernel, torch.empty(ROWS, ROWS), mistake)
