"""A stand-in for a CUDA graph on any device: operations of torch that are recorded once and executed again."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim")


class Tape(TorchDispatchMode):
    """Records what is called within it. A replay knows the tensors only: whatever else an operation was given stays.

    As in a capture, tensors that were there before are used again, and those that an operation makes are made anew;
    what asks for the values of a tensor is refused.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        results = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, results))
        return results

    def replay(self) -> None:
        made = {}
        with torch.autocast("cpu", enabled=False):  # its casts are among the calls
            for func, args, kwargs, recorded in self.calls:
                args, kwargs = tree_map_only(torch.Tensor, lambda x: made.get(id(x), x), (args, kwargs))
                results = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(results), strict=True):
                    made[id(old)] = new


def capture_on_tape(call: Callable[[], None], model: torch.nn.Module, device: torch.device) -> Callable[[], None]:
    """As ``qstar.experimental.cuda_graph.capture``, but that recording also executes: what it wrote is put back.

    Nothing that ``call`` does on the host happens in a replay.
    """
    state = [x for x in vars(call).values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in state]
    tape = Tape()
    with tape:
        call()
    for x, value in zip(state, before, strict=True):
        x.copy_(value)
    return tape.replay
