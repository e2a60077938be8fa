"""What a Gluon program runs on in the emulator: its threads, barriers, memory and copy engine."""

from __future__ import annotations

import random
import threading
from collections import deque
from types import SimpleNamespace

import torch
from torch import Tensor

PATIENCE = 20.0  # seconds until a wait is a deadlock


class Mistake(Exception):
    """What a kernel must not do."""


def demand(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Mistake(otherwise)


class Program:
    """What the threads of one program share."""

    seed = 0  # of the order of transfers
    pauses, pause = 0.3, 0.0005  # how often the copy engine rests before a transfer, and how long in seconds

    def __init__(self, index: int, programs: int):
        self.index, self.programs = index, programs
        self.changed = threading.Condition()
        self.random = random.Random(self.seed + index)
        self.failures: list[BaseException] = []
        self.transfers: deque = deque()
        self.running = True

    def wait_until(self, condition) -> None:
        with self.changed:
            while not condition():
                if self.failures:
                    raise RuntimeError("another partition failed")
                if not self.changed.wait(PATIENCE):
                    raise Mistake("deadlock: a barrier was never completed")

    def transfer_later(self, action) -> None:
        with self.changed:
            self.transfers.append(action)
            self.changed.notify_all()

    def run_transfers(self) -> None:
        """The copy engine: some transfer that was asked for, not the first one always, after a while."""
        while True:
            with self.changed:
                if not self.transfers:
                    if not self.running:
                        return
                    self.changed.wait(0.05)
                    continue
                if self.random.random() < self.pauses:
                    self.changed.wait(self.pause)
                window = min(3, len(self.transfers))
                chosen = self.random.randrange(window)
                action = self.transfers[chosen]
                del self.transfers[chosen]
                try:
                    action()
                except BaseException as failure:
                    self.failures.append(failure)
                self.changed.notify_all()


class Partition(threading.local):
    """What belongs to the running thread."""

    program: Program
    products: deque
    stores: list


here = Partition()


class Barrier:
    def __init__(self):
        self.count = None

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def change(self, arrivals: int, transferred: int) -> None:
        """With the program's lock held."""
        self.pending -= arrivals
        self.bytes += transferred
        demand(self.pending >= 0, "more arrivals at a barrier than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
        here.program.changed.notify_all()


class Barriers:
    def __init__(self, count: int):
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, place: int) -> Barrier:
        return self.barriers[place]


class Shared:
    """A view of shared memory; the last dimension of an allocation may be padded nowhere."""

    def __init__(self, data: Tensor):
        self.data = data

    dtype = property(lambda self: self.data.dtype)
    shape = property(lambda self: list(self.data.shape))

    def index(self, place: int) -> Shared:
        return Shared(self.data[place])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        demand(list(value.shape) == self.shape and value.dtype == self.dtype, "not what the place is made for")
        self.data.copy_(value)


class Pointer:
    def __init__(self, tensor: Tensor, offsets: Tensor | int):
        self.tensor, self.offsets = tensor, offsets
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offsets) -> Pointer:
        return Pointer(self.tensor, self.offsets + offsets)

    def reach(self, mask) -> tuple[Tensor, Tensor]:
        """The memory of the tensor, and where in it; what the mask keeps must lie there."""
        memory = self.tensor.as_strided((self.tensor.untyped_storage().nbytes() // self.tensor.itemsize,), (1,), 0)
        offsets = torch.as_tensor(self.offsets) + self.tensor.storage_offset()
        kept = offsets if mask is None else offsets[torch.broadcast_to(mask, offsets.shape)]
        demand(bool(((kept >= 0) & (kept < len(memory))).all()), "out of the tensor's memory")
        return memory, offsets


class Descriptor:
    """A tensor descriptor of the host as a kernel sees it."""

    def __init__(self, host):
        self.base, self.sizes, self.strides = host.base.detach(), host.shape, host.strides
        self.dtype, self.layout = host.base.dtype, None
        box = list(host.block_shape)
        self.block_type = SimpleNamespace(shape=box, nbytes=torch.Size(box).numel() * host.base.itemsize)

    def box(self, at) -> tuple[Tensor, Tensor]:
        """The whole tensor, and for each element of the box where it lies there, -1 beyond its edges."""
        whole = self.base.as_strided(self.sizes, self.strides, self.base.storage_offset())
        places, inside = torch.zeros(()).long(), torch.ones(()).bool()
        for size, extent, start in zip(self.sizes, self.block_type.shape, at, strict=True):
            index = torch.arange(extent) + start
            places = places[..., None] * size + index
            inside = inside[..., None] & (index >= 0) & (index < size)
        return whole, torch.where(inside, places, -1)
