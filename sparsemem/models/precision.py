"""Autocast ends where the memory begins."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsemem.models.controller import map_tensors


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on where a tensor is."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def outside_autocast(function: Callable[..., Any], like: Tensor, *parts: Any) -> Any:
    """`function(*parts)`; under autocast, without it and with floats in the dtype of `like`.

    Layers may compute in half precision, but what a memory adds up over many steps, and finds by
    small differences of cosines, is kept in its own. `parts` are nested tuples of tensors.
    """
    if not is_autocast(like):
        return function(*parts)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(like.dtype) if tensor.is_floating_point() else tensor

    with torch.autocast(like.device.type, enabled=False):
        return function(*map_tensors(cast, parts))
