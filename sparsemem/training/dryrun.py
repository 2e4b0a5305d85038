"""What a training step allocates, counted without doing it, or on a small one.

Models with a dense memory are run on torch's meta device, which has shapes and no data: all that
a step allocates is summed, at the config's own sizes. Sparse models choose rows by their values,
so a few steps of a few sequences are run in earnest, and what grows with steps and sequences is
scaled up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparsemem.models.base import Cell, MemoryModel
from sparsemem.models.dense import DenseCell
from sparsemem.models.memory_lstm import MemoryLSTMCell
from sparsemem.models.sam import SAMCell
from sparsemem.models.sdnc import SDNCCell
from sparsemem.training.banks import dense_parameters

# Steps that are run where a chunk has more.
STEPS = (6, 12)
DENSE_STEPS = (4, 8)  # of dense memories: what a step takes is the same at any
PROBE_BATCH = 16  # sequences of sparse models that are run where there are more
INT = 8  # bytes of an id


class AllocationMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the bytes of tensors alive, as operations make them and the last reference goes.

    known: tensors that were there before and don't count, nor views of them.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: int = 0
        self.peak: int = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do it, and count what it returns that was not there before."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return  # what a sparse tensor is made of was counted
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in self._known:
            return
        self._storages[key] = weakref.ref(storage, partial(self._freed, key, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def _freed(self, key: int, size: int, _: Any) -> None:
        self.alive -= size
        self._storages.pop(key, None)


class StepSizes(NamedTuple):
    """A training step: sequences, steps of a chunk, and steps of a whole sequence."""

    batch: int
    chunk: int
    steps: int


def is_sparse(cell: Cell) -> bool:
    """Whether which rows are touched depends on values, so that a meta run cannot tell."""
    return isinstance(cell, SAMCell | MemoryLSTMCell)


class Pass(NamedTuple):
    """A forward (and backward) pass: bytes at its peak, and how far a sparse memory has grown."""

    peak: int
    touched: int = 0  # slots, of the sequence that touched most
    capacity: int = 0  # rows that there is room for
    links: int = 0  # rows of links that there is room for


def run_pass(model: MemoryModel, batch: int, steps: int, training: bool = True) -> Pass:
    """Count what a pass takes beyond parameters, on the model's own device.

    Gradients of an earlier pass are there at first, as in a training loop, and count too.
    """
    weight, known = model.output.weight, [*model.parameters(), *model.buffers()]
    with torch.set_grad_enabled(training), AllocationMeter(known) as meter:
        gradients = [torch.empty_like(p) for p in dense_parameters(model)] if training else []
        output, grown = _forward(model, weight.new_zeros(batch, steps, model.input_size))
        gradients.clear()
        if training:
            output.square().mean().backward()  # type: ignore[no-untyped-call]
        del output
    for parameter in model.parameters():
        parameter.grad = None
    return Pass(meter.peak, *grown)


def _forward(model: MemoryModel, input: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`model(input)`, and how far its memory has grown.

    Dense models do without the checks, which look at values: there are none on meta.
    """
    if is_sparse(model.cell):
        output, state = model(input)
        if not isinstance(model.cell, SAMCell):
            return output, (0, 0, 0)
        links = state.links.follows.ids.shape[2] if isinstance(model.cell, SDNCCell) else 0
        return output, (state.episode.extent, state.episode.capacity, links)
    state, features = model.initial_state(len(input)), []
    for step in input.unbind(1):
        feature, state = model.cell(step, state)
        features.append(feature)
    return model.output(torch.stack(features, 1)), (0, 0, 0)


def linear(at: tuple[int, int], values: tuple[float, float], where: int | float) -> float:
    """The value at `where` of the line through two points."""
    slope = (values[1] - values[0]) / (at[1] - at[0])
    return values[1] + slope * (where - at[1])


class StepBytes(NamedTuple):
    """Bytes of a pass beyond parameters: what sequences touched, and all else at the peak."""

    memory: float
    rest: float  # gradients, activations, temporaries


def step_bytes(model: MemoryModel, sizes: StepSizes, training: bool = True) -> StepBytes:
    """What a pass takes beyond parameters.

    model: on the meta device, or, if sparse, on a real device. What is too long, or has too many
    sequences for a real run, is extrapolated: it is linear in both but for the tables of what was
    touched, which double and are known.
    """
    probe = DENSE_STEPS if isinstance(model.cell, DenseCell) else STEPS
    short, long = (min(steps, sizes.chunk) for steps in probe)

    def rest(batch: int) -> tuple[float, Pass]:
        run = run_pass(model, batch, long, training)
        found = float(run.peak - memory_bytes(model.cell, batch, run))
        if sizes.chunk == long:
            return found, run
        half = run_pass(model, batch, short, training)
        before = float(half.peak - memory_bytes(model.cell, batch, half))
        return linear((short, long), (before, found), sizes.chunk), run

    batch = min(sizes.batch, PROBE_BATCH) if is_sparse(model.cell) else sizes.batch
    found, run = rest(batch)
    if batch < sizes.batch:
        found = linear((batch // 2, batch), (rest(batch // 2)[0], found), sizes.batch)
    later = grown(model.cell, run, long, sizes.steps)
    return StepBytes(float(memory_bytes(model.cell, sizes.batch, later)), found)


def grown(cell: Cell, run: Pass, ran: int, steps: int) -> Pass:
    """How far the memory of a pass of `ran` steps will have grown after `steps`.

    It goes on touching as many slots a step: those that its heads write, and the untouched ones
    that they read. Tables double when they are full.
    """
    if not isinstance(cell, SAMCell):
        return run
    touched = min(-(-run.touched * steps // ran), cell.num_slots)
    room = min(touched + cell.top_k, cell.num_slots)  # a search looks at some untouched rows
    capacity = min(doubled(run.capacity, room), cell.num_slots)
    return Pass(run.peak, touched, capacity, doubled(run.links, touched))


def memory_bytes(cell: Cell, batch: int, run: Pass) -> int:
    """Bytes of what a sparse model's sequences have touched, with the buffer of its gradient."""
    if not isinstance(cell, SAMCell):
        return 0
    size = cell.interface.weight.element_size()
    row = 2 * cell.slot_dim * size + size + INT  # row, its gradient, its norm, its last access
    links = 0
    if isinstance(cell, SDNCCell):
        links = 2 * cell.num_heads * run.links * cell.num_links * (INT + size)
    index = 0
    if cell.index_after is not None and run.touched > cell.index_after:
        # A tree: a byte a number and an id in lists that are two thirds full, as much room, places.
        index = 3 * run.touched * (cell.slot_dim + INT) + run.capacity * INT
    return batch * (run.capacity * row + links + index)


def doubled(capacity: int, needed: int) -> int:
    """A capacity that has been doubled until it holds `needed`."""
    while 0 < capacity < needed:
        capacity *= 2
    return capacity


def optimiser_bytes(optimiser: torch.optim.Optimizer, model: nn.Module) -> tuple[int, int]:
    """Bytes of an optimiser's state, and of its temporaries at the peak of a step, on meta.

    Of all parameters but a bank's rows.
    """
    parameters = dense_parameters(model)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None]
    with AllocationMeter([*parameters, *gradients]) as meter:
        optimiser.step()
    state = meter.alive
    for parameter in parameters:
        parameter.grad = None
    return state, meter.peak - state
