"""Calls and answers as a tree of plain values and a list of arrays: for the wire and for logs.

Ray hands numpy arrays over without a copy, where it copies tensors; and a log holds arrays in
safetensors. What can be packed: None, bools, numbers, strings, tensors, tuples, lists, dicts with
strings as keys, and the named tuples that shards answer with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsemem.distributed.merging import Offer
from sparsemem.distributed.shard import Counted, ShardFound
from sparsemem.optim.remote import Push, RowStep

RECORDS = {record.__name__: record for record in (Counted, Offer, ShardFound, Push, RowStep)}
Array = Any  # numpy's; an array of any shape and dtype
PLAIN = (bool, int, float, str, type(None))
# What numpy has no dtype for goes as integers of that size.
AS_INTEGERS = {torch.bfloat16: torch.int16}


def pack(value: Any) -> tuple[Any, list[Tensor]]:
    """The tree of a value, in which {"tensor": i} stands for tensor i; and the tensors."""
    tensors: list[Tensor] = []

    def visit(value: Any) -> Any:
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, Tensor):
            tensors.append(value.detach())
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {"dict": {key: visit(part) for key, part in value.items()}}
        if isinstance(value, tuple | list):
            name = type(value).__name__
            kind = "record" if name in RECORDS else "list" if isinstance(value, list) else "tuple"
            return {kind: [visit(part) for part in value], "name": name}
        raise TypeError(f"a call holds a {type(value).__name__}, which cannot be sent")

    return visit(value), tensors


def unpack(tree: Any, tensors: list[Tensor]) -> Any:
    """The value that `pack` took. ValueError for a tree that it cannot have made."""
    if isinstance(tree, PLAIN):
        return tree
    try:
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        if "dict" in tree:
            return {key: unpack(part, tensors) for key, part in tree["dict"].items()}
        (kind,) = tree.keys() - {"name"}
        parts = [unpack(part, tensors) for part in tree[kind]]
        if kind == "record":
            return RECORDS[tree["name"]](*parts)
        return {"list": list, "tuple": tuple}[kind](parts)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a call or answer is not as it was sent: {error!r}") from None


def to_numpy(tensor: Tensor) -> tuple[str, Array]:
    """The name of a tensor's dtype, and its numbers; without a copy if it is contiguous."""
    numbers = tensor.cpu().contiguous()
    numbers = numbers.view(AS_INTEGERS.get(tensor.dtype, tensor.dtype))
    return str(tensor.dtype).removeprefix("torch."), numbers.numpy()


def from_numpy(name: str, numbers: Array) -> Tensor:
    """The tensor. Arrays that Ray hands over cannot be written to: those are copied."""
    tensor = torch.from_numpy(numbers if numbers.flags.writeable else numbers.copy())
    return tensor.view(getattr(torch, name))


class Packed(NamedTuple):
    """A value on the wire."""

    tree: Any
    dtypes: list[str]
    arrays: list[Array]


def sent(value: Any) -> Packed:
    """A value as it goes over the wire."""
    tree, tensors = pack(value)
    named = [to_numpy(tensor) for tensor in tensors]
    return Packed(tree, [name for name, _ in named], [array for _, array in named])


def received(packed: Packed) -> Any:
    """The value that was sent."""
    named = zip(packed.dtypes, packed.arrays, strict=True)
    return unpack(packed.tree, [from_numpy(name, array) for name, array in named])
