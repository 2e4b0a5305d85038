"""A team of processes: members of a torch.distributed group, one a worker.

Dense gradients are averaged by DistributedDataParallel; what the team agrees on is gathered from
all and added up in the order of the members, so that it is the same number on each.
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsemem.bank.rows import bank_of
from sparsemem.optim.remote import remote_bank_of
from sparsemem.tasks import Batch
from sparsemem.training.team import share_of

AnyModel = TypeVar("AnyModel", bound=nn.Module)

# While member 0 validates or saves, the others wait. Whoever is gone is noticed at once, by its
# connections, or by Ray, which ends the others.
PATIENCE = timedelta(days=1)


class GroupTeam:
    """The members of the torch.distributed group that this process has joined: see `join`.

    is_asked: whether this member is asked to stop by others than its own process's signals.
    """

    def __init__(self, is_asked: Callable[[], bool] = lambda: False) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._is_asked = is_asked
        self._stop_here = self._stop = False  # on this member; on any, as of the last `means`

    def share(self, batch: Batch) -> Batch:
        """This member's sequences of a batch."""
        return share_of(batch, self.rank, self.size)

    def means(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the team, the same on all members."""
        own = torch.tensor([*values, float(self._stop_here)], dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own)
        *found, stop = torch.stack(gathered).mean(0).tolist()
        self._stop = stop > 0
        return found

    def told(self, values: Sequence[float]) -> list[float]:
        """The values of member 0, on all members."""
        told = torch.tensor(list(values), dtype=torch.float64)
        dist.broadcast(told, 0)
        return told.tolist()

    def asked(self, stop: bool) -> bool:
        """Whether a member was asked to stop, as of the last `means`."""
        self._stop_here = stop or self._is_asked()
        return self._stop

    def wrapped(self, model: AnyModel) -> AnyModel | nn.Module:
        """The model, whose dense gradients are averaged; those of remote rows are not its business.

        Its buckets stay as they are laid out at first (as they do where it looks for parameters
        without a gradient): a number's place in them is the order in which the members' parts are
        added up, so that a team that starts again goes on to the same bits.

        It takes parameters of one kind of device. Sub-keys of product keys stay on the host where
        the rest is on a GPU, and are averaged by themselves.
        """
        named = dict(model.named_parameters())
        remote = [name for name, x in named.items() if remote_bank_of(x) is not None]
        device = next(x.device for x in named.values() if bank_of(x) is None)
        beside = [name for name, x in named.items() if name not in remote and x.device != device]
        for name in beside:
            average_gradient(named[name])
        leave_out: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        leave_out(model, [*remote, *beside])
        return DistributedDataParallel(model, find_unused_parameters=True)


def average_gradient(parameter: Tensor) -> None:
    """From now on a backward pass ends with the mean of all members' gradients of a parameter.

    Each pass of each member has to reach it: the others wait.
    """

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad /= dist.get_world_size()
        dist.all_reduce(parameter.grad)

    parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]


def join(
    rank: int,
    size: int,
    address: str,
    agreed: Callable[[tuple[str, int] | None], tuple[str, int]],
    *,
    on_gpu: bool = False,
) -> None:
    """Join the processes of a team into the default group of torch.distributed.

    torch's own start listens on all of the machine's addresses; here member 0 listens on its own.

    Args:
        address: this member's, which the others reach it by.
        agreed: given member 0's address and port by that member, and None by the others, has them
            on all.
        on_gpu: gradients are on GPUs.
    """
    listener = socket.create_server((address, 0)) if rank == 0 else None
    host, port = agreed(None if listener is None else (address, listener.getsockname()[1]))
    if host.startswith("127."):  # else gloo takes the address of the machine's name
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    descriptor = None if listener is None else listener.detach()
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, rank == 0, PATIENCE, wait_for_workers=False, master_listen_fd=descriptor
    )
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def leave() -> None:
    """Leave the group, of which nobody may hold a model any more that was `wrapped` in it.

    Such a model also holds the group. Where it goes last, torch waits for the group's threads
    while it holds Python's lock, which they may need to let go of a tensor: for ever. The group
    by itself is let go of without the lock (github.com/pytorch/pytorch/pull/154976).
    """
    gc.collect()  # models that only refer to themselves
    dist.destroy_process_group()
