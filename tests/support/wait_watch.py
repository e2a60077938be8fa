"""Where the host asks a tensor for its values: on a GPU it waits there, until all that was launched is done."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ASKING = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "numpy", "cpu"),
    *("nonzero", "argwhere", "unique", "masked_select", "bincount", "equal", "allclose", "tensor", "as_tensor"),
}


class WaitWatch(TorchFunctionMode):
    """Within it: ``waits``, the calls that would wait for a GPU, from a list to a new tensor included."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if name in ASKING or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))
