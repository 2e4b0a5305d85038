"""Where the host must not wait: tensors whose values it does not see at once."""

import torch
from torch import Tensor

from sparsemem.indexes.triton_switch import use_triton


def is_device(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values makes the host wait, or is to be taken for that."""
    return tensor.device.type != "cpu" or use_triton(tensor)


def is_capturing(tensor: Tensor) -> bool:
    """Whether what is done with a tensor is being recorded as a CUDA graph: it has no values."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
