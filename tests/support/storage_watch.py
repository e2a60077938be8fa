"""What an op holds and multiplies, seen from the dispatcher."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageWatch(TorchDispatchMode):
    """Within it: the largest storage made, in bytes; how many of ``at_least`` bytes lived at once; the products' sizes.

    ``products`` lists (rows, inner, columns) of every matrix product.
    """

    def __init__(self, at_least: int):
        super().__init__()
        self.at_least = at_least
        self.largest = 0
        self.most_alive = 0
        self.products = []
        self._seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            left, right = tensors[-2:]
            self.products.append((*left.shape, right.shape[1]))
        elif func.overloadpacket is torch.ops.mkldnn._linear_pointwise:  # of oneDNN, which some CPUs take
            left, right = tensors[:2]
            self.products.append((*left.shape, right.shape[0]))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in before:
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        alive = sum(size >= self.at_least for _, size in self._seen.values())
        self.most_alive = max(self.most_alive, alive)
        return out
