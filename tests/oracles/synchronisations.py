"""What makes the host wait for a device, seen from the operations that torch dispatches.

`with Synchronisations() as waits:` works on CPU tensors and on a device's alike; `waits.found`
names the operations that would look at values, and those that have tensors of two devices. It
does not see `tolist` of a CPU tensor, nor branches that torch's own backward formulas take
without dispatching (`prod`, `cumprod`): `torch.cuda.set_sync_debug_mode` does, on a GPU.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",  # of torch.tensor: numbers go from the host to the device
    "masked_select",
    "nonzero",
    "nonzero_static",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
BRANCHING = {"cumprod", "prod"}  # their backward passes look for zeros
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MASKS = (torch.bool, torch.uint8)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def waits_for(name, given, result):
    """Whether an operation has the host wait (or what it does to gradients has)."""
    inputs = tensors_of(given)
    if name in WAITING:
        return True
    if name in BRANCHING and any(tensor.requires_grad for tensor in inputs):
        return True
    if name in INDEXING and any(tensor.dtype in MASKS for tensor in inputs[1:]):
        return True
    return len({tensor.device for tensor in inputs + tensors_of(result)}) > 1


class Synchronisations(TorchDispatchMode):
    """Names of operations that have the host wait, in their order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if waits_for(name, (args, kwargs), result):
            self.found.append(name)
        return result
