"""Where the host must not wait: tensors whose values it does not see at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsemem.indexes.triton_switch import use_triton


def is_device(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values makes the host wait, or is to be taken for that.

    There, what depends on values is done by masks, and work is not left out by looking first.
    """
    return tensor.device.type != "cpu" or use_triton(tensor)


_rehearsed = False


@contextmanager
def rehearsal() -> Iterator[None]:
    """Everything in the block is done as if it were being recorded as a CUDA graph."""
    global _rehearsed
    before, _rehearsed = _rehearsed, True
    try:
        yield
    finally:
        _rehearsed = before


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is being recorded as a CUDA graph: it has no values."""
    return tensor.is_cuda and (_rehearsed or torch.cuda.is_current_stream_capturing())
