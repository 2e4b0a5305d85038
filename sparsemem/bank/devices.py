"""Where the host must not wait."""

from torch import Tensor

from sparsemem.indexes.triton_switch import use_triton


def on_device(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values makes the host wait, or is to be taken for that.

    There, what depends on values is done by masks, and work is not left out by looking first.
    """
    return tensor.device.type != "cpu" or use_triton(tensor)
