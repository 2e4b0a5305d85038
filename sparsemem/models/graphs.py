"""One sequence's forward and backward pass as a pair of CUDA graphs, and how they are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from sparsemem.devices import rehearsal
from sparsemem.models.base import MemoryModel


class Room(NamedTuple):
    """Where graphs are recorded that share memory, which is reused within one stream only."""

    pool: Any
    stream: Any  # of the graphs' device; torch's own for captures is of whichever came first


def room_on(device: torch.device) -> Room:
    """A new one."""
    return Room(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class Graphs:
    """Forward and backward pass of whole sequences of one shape, captured.

    All tensors stay where they are: inputs are copied in, outputs and gradients overwritten. The
    backward pass goes through the last forward pass, once: it reuses the memory as it goes.
    """

    def __init__(self, model: MemoryModel, input: Tensor, room: Room) -> None:
        self._take(model, input)
        with torch.cuda.device(input.device), uncached_autocast(), same_stream():
            self._rehearse()
            self._capture(room)

    def _take(self, model: MemoryModel, input: Tensor) -> None:
        """The model, and what it is to be run on."""
        self._model = model
        self._input = leaf_like(input.clone(), input)
        # Leaves of its own, of the same memory: autograd remembers the stream in which it first
        # saw a leaf, and has a capture wait for it, which is refused.
        self._leaves = {name: leaf_like(own, own) for name, own in model.named_parameters()}
        inputs = (self._input, *self._leaves.values())
        self._trained = [tensor for tensor in inputs if tensor.requires_grad]

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and slots touched."""
        with torch.no_grad():
            self._input.copy_(input)
        self._forward.replay()
        return self._output, self._touched

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what requires one: the input, the parameters; None where they play no part.

        gradient: of the output.
        """
        self._gradient.copy_(gradient)
        self._backward.replay()
        return self._gradients

    def _run(self) -> tuple[Tensor, Tensor]:
        output, state = functional_call(self._model, self._leaves, (self._input,))
        return output, state.touched

    def _gradients_of(self, output: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(output, self._trained, self._gradient, allow_unused=True)

    def _rehearse(self) -> None:
        """Have done all that is done at a first time, and refuse what cannot be captured.

        The second time whatever has the host wait raises: in a capture that would raise, too, and
        leave torch's allocator and random numbers in the middle of it.
        """
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()), rehearsal():  # type: ignore[no-untyped-call]
            self._both_ways()
            with no_waits():
                self._both_ways()
        torch.cuda.synchronize()

    def _both_ways(self) -> None:
        output, _ = self._run()
        self._gradient = torch.ones_like(output)
        if output.requires_grad:
            self._gradients_of(output)

    def _capture(self, room: Room) -> None:
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # What other threads do meanwhile, a bank's upkeep perhaps, is theirs.
        mode = {**room._asdict(), "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, **mode):
            output, self._touched = self._run()
        self._gradients: tuple[Tensor | None, ...] = ()
        if output.requires_grad:
            with torch.cuda.graph(self._backward, **mode):
                self._gradients = self._gradients_of(output)
        self._output = output.detach()


def leaf_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A leaf of autograd's graphs of the same memory, that requires a gradient as `like` does."""
    return tensor.detach().requires_grad_(like.requires_grad)


@contextmanager
def no_waits() -> Iterator[None]:
    """What has the host wait for the GPU raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def same_stream() -> Iterator[None]:
    """Afterwards the stream is what it was: a capture that failed leaves its own."""
    stream = torch.cuda.current_stream()
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Autocast as it is, but casting weights anew: casts made outside are not in a graph."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
