"""Who uses `training.threads`: the compiled kernels that take a model's steps, or torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparsemem.kernels import kernels_for
from sparsemem.kernels.threads import own_threads, use_threads
from sparsemem.models.registry import find_model
from sparsemem.models.sam import SAM
from sparsemem.models.sdnc import SDNC
from sparsemem.training.config import Config


def set_threads(config: Config) -> None:
    """Give a config's threads to the kernels where these take its model's steps, else to torch.

    Not to both: torch's threads wait for one another by spinning, on the cores that the kernels'
    need. What is set is global.
    """
    count = config.training.threads
    by_kernels = count > 1 and has_kernels(config)
    torch.set_num_threads(1 if by_kernels else count)
    use_threads(count if by_kernels else None)


@contextmanager
def threads_of(config: Config) -> Iterator[None]:
    """`set_threads` for a while."""
    before = torch.get_num_threads(), own_threads()
    set_threads(config)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        use_threads(before[1])


def has_kernels(config: Config) -> bool:
    """Whether compiled kernels take the steps of a config's model."""
    model = find_model(config.model.name)
    if not issubclass(model, SAM | SDNC) or config.bank is not None:
        return False
    dtype = getattr(torch, config.training.dtype)
    on_host = config.training.device.startswith("cpu")
    return on_host and kernels_for(dtype, links=issubclass(model, SDNC)) is not None
