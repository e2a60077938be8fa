"""Gluon kernels on a CPU: threads for the warps of a program, and everything asynchronous as late as it may be.

Triton's interpreter does not know Gluon. Here a kernel's own Python runs, with stand-ins for the language:

- a partition of ``warp_specialize`` is a thread; barriers count arrivals and bytes, as a card's do;
- a copy fills its place with NaN at once and with the data after a random while, and a store to global memory reads
  its place only then: whoever does not wait, or lets a place go too early, gets it wrong;
- a product is computed when it is waited for, from what its operands in shared memory hold by then;
- loads and stores by pointers are checked to lie in their tensor.

Layouts, registers and speed are beyond it. Where float64 is given, ``gl.float32`` is float64: then results are exact.
"""

from __future__ import annotations

import threading
import types
from collections import deque
from types import SimpleNamespace

import torch
from gluon_machine import Barrier, Barriers, Descriptor, Pointer, Program, Shared, demand, here
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import constexpr


class Product:
    """An asynchronous product, computed as late as it may be."""

    def __init__(self, a, b: Shared, acc: Tensor | Product, use_acc: bool):
        self.operands = a, b, acc, use_acc
        self.result = None

    def compute(self) -> None:
        a, b, acc, use_acc = self.operands
        a = a.data if isinstance(a, Shared) else a
        if isinstance(acc, Product):
            demand(acc.result is not None, "products into one accumulator out of order")
            acc = acc.result
        product = a.to(acc.dtype) @ b.data.to(acc.dtype)
        self.result = acc + product if use_acc else product


def warpgroup_mma(a, b, acc, *, use_acc=True, is_async=False):
    product = Product(a, b, acc, use_acc)
    here.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(outstanding: int, deps: list):
    while len(here.products) > outstanding:
        here.products.popleft().compute()
    done = [x.result if isinstance(x, Product) and x.result is not None else x for x in deps]
    return done[0] if len(done) == 1 else tuple(done)


def barrier_init(barrier: Barrier, count: int) -> None:
    barrier.init(count)


def barrier_expect(barrier: Barrier, size: int) -> None:
    with here.program.changed:
        barrier.change(1, size)


def barrier_arrive(barrier: Barrier, *, count: int = 1, pred=True) -> None:
    demand(not here.products, "a place is let go while a product may read it")
    if pred:
        with here.program.changed:
            barrier.change(count, 0)


def barrier_wait(barrier: Barrier, phase: int) -> None:
    here.program.wait_until(lambda: barrier.phase & 1 != phase)


def copy_in(descriptor: Descriptor, at, barrier: Barrier, place: Shared) -> None:
    place.data.fill_(torch.nan)
    program = here.program

    def transfer():
        here.program = program
        whole, places = descriptor.box(at)
        flat = whole.reshape(-1)
        place.data.copy_(torch.where(places >= 0, flat[places.clamp(min=0)], 0))
        barrier.change(0, -descriptor.block_type.nbytes)

    program.transfer_later(transfer)


def copy_out(descriptor: Descriptor, at, place: Shared) -> None:
    done = threading.Event()
    stores = here.stores
    stores.append(done)

    def transfer():
        whole, places = descriptor.box(at)
        inside = places >= 0
        index = torch.unravel_index(places[inside], whole.shape)
        whole[index] = place.data[inside]
        done.set()

    here.program.transfer_later(transfer)


def store_wait(pending: int) -> None:
    here.program.wait_until(lambda: all(done.is_set() for done in here.stores))
    here.stores.clear()


def warp_specialize(partitions, worker_num_warps, worker_num_regs) -> None:
    program = here.program
    demand(len(partitions) == 1 + len(worker_num_warps) == 1 + len(worker_num_regs), "partitions without warps")

    def run(function, arguments):
        here.program, here.products, here.stores = program, deque(), []
        try:
            function(*arguments)
            demand(not here.products, "a product was never waited for")
            demand(not here.stores, "a store was never waited for")
        except BaseException as failure:
            with program.changed:
                program.failures.append(failure)
                program.changed.notify_all()

    threads = [threading.Thread(target=run, args=partition) for partition in partitions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def language(single: torch.dtype) -> SimpleNamespace:
    """The stand-in for ``gluon.language``; ``single`` is what float32 is."""

    def either(on_tensors, on_numbers):
        def call(x, y):
            if not isinstance(x, Tensor) and not isinstance(y, Tensor):
                return on_numbers(x, y)
            return on_tensors(torch.as_tensor(x), torch.as_tensor(y))

        return call

    def allocate(dtype, shape, layout):
        if layout == "barriers":
            return Barriers(shape[0])
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def load(pointer, mask=None, other=None):
        memory, offsets = pointer.reach(mask)
        if mask is None:
            return memory[offsets]
        return torch.where(mask, memory[offsets.clamp(0, len(memory) - 1)], torch.tensor(other, dtype=memory.dtype))

    def store(pointer, value, mask=None):
        memory, offsets = pointer.reach(mask)
        keep = torch.ones_like(offsets).bool() if mask is None else torch.broadcast_to(mask, offsets.shape)
        demand(value.dtype == memory.dtype, "another dtype than the tensor's")
        memory[offsets[keep]] = value[keep].to(memory.dtype)

    def layout(*_, **__):
        return "layout"

    return SimpleNamespace(
        constexpr=constexpr,
        float32=single,
        int64=torch.int64,
        NVMMADistributedLayout=layout,
        DotOperandLayout=layout,
        SliceLayout=layout,
        BlockedLayout=layout,
        SwizzledSharedLayout=layout,
        program_id=lambda axis: here.program.index,
        num_programs=lambda axis: here.program.programs,
        static_range=range,
        cdiv=lambda x, y: -(-x // y),
        cast=lambda x, dtype: x.to(dtype) if isinstance(x, Tensor) else x,
        minimum=either(torch.minimum, min),
        maximum=either(torch.maximum, max),
        where=torch.where,
        exp2=torch.exp2,
        log2=torch.log2,
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        arange=lambda start, end, layout: torch.arange(start, end),
        convert_layout=lambda x, layout: x,
        load=load,
        store=store,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
    )


MBARRIER = SimpleNamespace(
    MBarrierLayout=lambda: "barriers",
    init=barrier_init,
    expect=barrier_expect,
    arrive=barrier_arrive,
    wait=barrier_wait,
)
TMA = SimpleNamespace(async_copy_global_to_shared=copy_in, async_copy_shared_to_global=copy_out, store_wait=store_wait)


class Emulation:
    """The functions of a kernel, with the stand-ins for what they name."""

    def __init__(self, single: torch.dtype):
        self.names = {
            "gl": language(single),
            "mbarrier": MBARRIER,
            "tma": TMA,
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": warpgroup_mma_wait,
            "fence_async_shared": lambda: None,
        }
        self.made: dict = {}

    def function(self, jitted):
        if jitted not in self.made:
            plain = jitted.fn
            names = dict(plain.__globals__)
            copied = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
            self.made[jitted] = copied
            for name in plain.__code__.co_names:
                if name in self.names:
                    names[name] = self.names[name]
                elif hasattr(names.get(name), "is_gluon"):
                    names[name] = self.function(names[name])
                elif isinstance(names.get(name), constexpr):
                    names[name] = names[name].value
        return self.made[jitted]


def run(launch) -> None:
    """What ``launch.run()`` does on a card."""
    arguments, single = {}, torch.float32
    for name, value in launch.keywords.items():
        if isinstance(value, TensorDescriptor):
            value = Descriptor(value)
            single = torch.promote_types(single, value.dtype)
        elif isinstance(value, Tensor):
            value = Pointer(value.detach(), 0)
        arguments[name] = value
    kernel = Emulation(single).function(launch.kernel)
    arguments = {parameter.name: arguments[parameter.name] for parameter in launch.kernel.params}
    for index in range(launch.programs):
        program = Program(index, launch.programs)
        here.program, here.products, here.stores = program, deque(), []
        engine = threading.Thread(target=program.run_transfers)
        engine.start()
        try:
            kernel(**arguments)
        finally:
            program.running = False
            engine.join()
        if program.failures:
            raise program.failures[0]
