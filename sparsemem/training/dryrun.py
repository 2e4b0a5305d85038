"""What a training step allocates, counted without doing it, or on a small one.

Models with a dense memory are run on torch's meta device, which has shapes and no data: all that
a step allocates is summed, at the config's own sizes. Sparse models choose rows by their values,
so a few steps of a few sequences are run in earnest, and what grows with steps and sequences is
scaled up.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparsemem.memory.store import FIRST_CAPACITY
from sparsemem.models.base import Cell, MemoryModel
from sparsemem.models.sam import SAMCell
from sparsemem.models.sdnc import SDNCCell

STEPS = (12, 24)  # that are run where a chunk has more
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
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in self._known:
            return

        def freed(_: Any) -> None:
            self.alive -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.alive += size
        self.peak = max(self.peak, self.alive)


class StepSizes(NamedTuple):
    """A training step: sequences, steps of a chunk, and steps of a whole sequence."""

    batch: int
    chunk: int
    steps: int


def is_sparse(cell: Cell) -> bool:
    """Whether which rows are touched depends on values, so that a meta run cannot tell."""
    return isinstance(cell, SAMCell)


def peak_of(model: MemoryModel, batch: int, steps: int, training: bool = True) -> int:
    """Peak bytes beyond parameters, of a forward (and backward) pass on the model's own device.

    Gradients of an earlier pass are there at first, as in a training loop, and count too.
    """
    weight = model.output.weight
    with torch.set_grad_enabled(training), AllocationMeter(model.parameters()) as meter:
        gradients = [torch.empty_like(p) for p in model.parameters()] if training else []
        input = torch.zeros(
            batch, steps, model.input_size, dtype=weight.dtype, device=weight.device
        )
        output = _forward(model, input)
        gradients.clear()
        if training:
            output.square().mean().backward()  # type: ignore[no-untyped-call]
        del output
    for parameter in model.parameters():
        parameter.grad = None
    return int(meter.peak)


def _forward(model: MemoryModel, input: Tensor) -> Tensor:
    """`model(input)` without its checks, which look at values: there are none on meta."""
    state, features = model.initial_state(len(input)), []
    for step in input.unbind(1):
        feature, state = model.cell(step, state)
        features.append(feature)
    return model.output(torch.stack(features, 1))  # type: ignore[no-any-return]


def linear(at: tuple[int, int], values: tuple[float, float], where: float) -> float:
    """The value at `where` of the line through two points."""
    slope = (values[1] - values[0]) / (at[1] - at[0])
    return values[1] + slope * (where - at[1])


def step_bytes(model: MemoryModel, sizes: StepSizes, training: bool = True) -> float:
    """Peak bytes of a pass beyond parameters: gradients, activations and the memory.

    model: on the meta device, or, if sparse, on a real device. What is too long, or has too many
    sequences for a real run, is extrapolated: it is linear in both but for the tables of what was
    touched, which double and are known.
    """
    store = store_bytes(model.cell, sizes.batch, sizes.steps)
    steps = STEPS if training else (STEPS[0] // 2, STEPS[0])

    def beyond_store(batch: int, count: int) -> float:
        return float(peak_of(model, batch, count, training) - store_bytes(model.cell, batch, count))

    def at_batch(batch: int) -> float:
        if sizes.chunk <= STEPS[1]:
            return beyond_store(batch, sizes.chunk)
        return linear(
            steps, (beyond_store(batch, steps[0]), beyond_store(batch, steps[1])), sizes.chunk
        )

    if not is_sparse(model.cell) or sizes.batch <= PROBE_BATCH:
        return store + at_batch(sizes.batch)
    batches = (PROBE_BATCH // 2, PROBE_BATCH)
    return store + linear(batches, (at_batch(batches[0]), at_batch(batches[1])), sizes.batch)


def store_bytes(cell: Cell, batch: int, steps: int) -> int:
    """Bytes of what a sparse model's sequences have touched, with the buffer of its gradient.

    Tables double when they are full. A step touches as many fresh slots as there are heads, and
    reads up to top_k that nobody wrote.
    """
    if not isinstance(cell, SAMCell):
        return 0
    size = cell.interface.weight.element_size()
    extent = min(cell.num_slots, steps * cell.num_heads + cell.top_k)
    capacity = doubled(min(FIRST_CAPACITY, cell.num_slots), extent, cell.num_slots)
    row = 2 * cell.slot_dim * size + size + INT  # row, its gradient, its norm, its last access
    links = 0
    if isinstance(cell, SDNCCell):
        first = cell.num_heads + cell.top_k
        table = doubled(first, extent, 2 * max(extent, first)) * cell.num_links * (INT + size)
        links = 2 * cell.num_heads * table
    index = 0
    if cell.index_after is not None and extent > cell.index_after:
        index = extent * (4 * cell.slot_dim + 2 * INT)  # FAISS: float32 rows, ids, where they are
    return batch * (capacity * row + links + index)


def doubled(capacity: int, needed: int, limit: int) -> int:
    """A capacity that has been doubled until it holds `needed`."""
    while capacity < needed:
        capacity *= 2
    return min(capacity, limit)


def optimiser_bytes(optimiser: torch.optim.Optimizer, model: nn.Module) -> tuple[int, int]:
    """Bytes of an optimiser's state, and of its temporaries at the peak of a step, on meta."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with AllocationMeter([*model.parameters(), *gradients]) as meter:
        optimiser.step()
    state = meter.alive
    for parameter in model.parameters():
        parameter.grad = None
    return state, meter.peak - state
