"""Many steps of SAM with its LSTM by compiled kernels, as one operation of the tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemem import devices
from sparsemem.indexes.ranking import GRID_BITS
from sparsemem.indexes.triton_switch import use_triton
from sparsemem.kernels import Kernels, can_find, kernels_for
from sparsemem.kernels.fused import addresses, can_step
from sparsemem.kernels.threads import at_once, in_parts, shares
from sparsemem.memory.entries import Entries

if TYPE_CHECKING:
    from sparsemem.memory.store import EpisodeStore
    from sparsemem.memory.tape import Tape

MAX_STEPS = 128  # at once: bounds what is kept of steps that need no gradient
EVERYTHING = 2**62  # rows; more than there can be


class Layers(NamedTuple):
    """Weights that every step uses."""

    recurrent: Tensor  # [4 D, F], of the LSTM's gates: for its hidden state and the last reads
    interface: Tensor  # [H * I, D]
    bias: Tensor  # [H * I], the interface's


class Sizes(NamedTuple):
    """Of a sequence."""

    steps: int
    batch: int
    heads: int
    width: int
    inputs: int  # I
    top_k: int
    hidden: int  # D

    @property
    def growth(self) -> int:
        """Rows that a step may touch that none has touched before."""
        return self.heads + self.top_k

    @property
    def work(self) -> int:
        """Products of a step of the batch, about."""
        features = self.hidden + self.heads * self.width
        return self.batch * self.hidden * (4 * features + self.heads * self.inputs)


class Sequence(NamedTuple):
    """What T steps did to B elements: `take_sequence`. Row 0 of T + 1 is what was before them."""

    backward: Callable[..., None]  # as `go_back`, of kernels and sizes
    sizes: Sizes
    gates: Tensor  # [T, B, 4 D]
    cells: Tensor  # [T + 1, B, D]
    carried: Tensor  # [T + 1, B, F]
    values: Tensor  # [T, B, H * I]
    write_ids: Tensor  # [T, B, H, K + 1]
    write_weights: Tensor  # of the last step, [B, H, K + 1]
    ids: Tensor  # [T + 1, B, H, K]
    weights: Tensor  # [T + 1, B, H, K]
    rows: Tensor  # that were read, [T, B, H, K, W]

    @property
    def records(self) -> tuple[Tensor, ...]:
        """All tensors, in their order."""
        return self[2:]

    def cut(self, steps: int) -> Sequence:
        """The first steps."""
        parts = {}
        for name in ("gates", "cells", "carried", "values", "write_ids", "ids", "weights", "rows"):
            record = getattr(self, name)
            parts[name] = record[: steps + len(record) - self.sizes.steps].clone()
        return self._replace(sizes=self.sizes._replace(steps=steps), **parts)


def steps_at_once(store: EpisodeStore, last: Entries, top_k: int) -> int:
    """How many steps `take_sequence` can be asked for now; 0: none."""
    if use_triton(store.rows):
        from sparsemem.kernels.gpu.sequence import can_unroll

        possible = can_unroll(store, last, top_k)
    elif devices.is_device(store.rows):
        possible = False
    else:
        possible = sequence_kernels(store, last, top_k) is not None
    return MAX_STEPS if possible else 0


def sequence_kernels(store: EpisodeStore, last: Entries, top_k: int) -> Kernels | None:
    """The kernels, if the next step at least can be taken by `take_sequence`."""
    if (
        last.ids.shape[2] != top_k  # the first step, which has no last reads
        or store.order.kept.shape[1] != last.ids.shape[1]
        or not can_step(store, last.weights, last)
    ):
        return None
    kernels = kernels_for(store.rows.dtype, links=False)
    if kernels is None or is_barred(store, last.ids.shape[1] + top_k):
        return None
    return kernels


@torch.no_grad()
def take_sequence(
    store: EpisodeStore,
    gates: Tensor,
    carried: Tensor,
    cell: Tensor,
    last: Entries,
    top_k: int,
    layers: Layers,
) -> Sequence | None:
    """Take as many of T steps as can be; None, and nothing done, if that is none.

    Args:
        store: the memory, changed in place.
        gates: what the LSTM's gates get from the input, [T, B, 4 D]; contiguous, overwritten.
        carried: hidden state and reads of the step before, [B, F].
        cell: the LSTM's cell state [B, D].
        last: reads of the step before [B, H, K]; on a device there may be none.
        top_k: K, rows that a head reads.
        layers: the weights.
    """
    if use_triton(gates):
        from sparsemem.kernels.gpu.sequence import device_sequence

        return device_sequence(store, gates, carried, cell, last, top_k, layers)
    kernels = sequence_kernels(store, last, top_k)
    if kernels is None:
        return None
    sizes = sizes_of(store, gates, cell, last, layers)
    sequence = begun(partial(go_back, kernels), sizes, gates, carried, cell, last)
    taken = advance(kernels, store, sequence, transposed(layers))
    if taken == 0:
        return None
    return sequence if taken == len(gates) else sequence.cut(taken)


def sizes_of(
    store: EpisodeStore, gates: Tensor, cell: Tensor, last: Entries, layers: Layers
) -> Sizes:
    """Of the sequence that `take_sequence` is given."""
    batch, heads, top_k = last.ids.shape
    inputs, width = len(layers.bias) // heads, store.rows.shape[2]
    return Sizes(len(gates), batch, heads, width, inputs, top_k, cell.shape[1])


def begun(
    backward: Callable[..., None],
    sizes: Sizes,
    gates: Tensor,
    carried: Tensor,
    cell: Tensor,
    last: Entries,
) -> Sequence:
    """Room for a sequence's steps, with what was before them."""
    steps, batch, heads, width, inputs, k, _ = sizes
    rows = gates.new_empty(steps, batch, heads, k, width)
    values = gates.new_empty(steps, batch, heads * inputs)
    write_ids = last.ids.new_empty(steps, batch, heads, k + 1)
    write_weights = gates.new_empty(batch, heads, k + 1)
    before = [
        part.new_empty(steps + 1, *part.shape) for part in (cell, carried, last.ids, last.weights)
    ]
    for record, part in zip(before, (cell, carried, *last), strict=True):
        record[0] = part
    cells, features, ids, weights = before
    written = (values, write_ids, write_weights)
    return Sequence(backward, sizes, gates, cells, features, *written, ids, weights, rows)


def transposed(layers: Layers) -> tuple[Tensor, Tensor, Tensor]:
    """The weights as the kernel reads them, by rows: by what comes in."""
    recurrent, interface, bias = layers
    return recurrent.mT.contiguous(), interface.mT.contiguous(), bias.contiguous()


def advance(
    kernels: Kernels, store: EpisodeStore, sequence: Sequence, weights: tuple[Tensor, ...]
) -> int:
    """Take steps, with more room or a new lap where they stop for it; how many there are."""
    sizes, time, lap_begun = sequence.sizes, store.order.time, False
    bounds = shares(sizes.batch, sizes.work * sizes.steps)
    if len(bounds) > 2 and not goes_through(store, sequence):
        bounds = [0, sizes.batch]
    taken = [0] * (len(bounds) - 1)  # of each part
    while min(taken) < sizes.steps and not is_barred(store, sizes.growth):
        reserve(store, sizes)
        parts = [*zip(bounds, bounds[1:], taken, strict=False)]
        now = run(kernels, store, sequence, weights, parts, time)
        has_room = store.extent + sizes.growth <= rows_allowed(store)
        if now == taken and has_room:
            if lap_begun:
                break  # the last reads are out of place; a step by itself tells
            store.order.least_recent(sizes.heads)  # begins a lap, from which the kernel goes on
        taken, lap_begun = now, now == taken and has_room
    return min(taken)


def goes_through(store: EpisodeStore, sequence: Sequence) -> bool:
    """Whether nothing but room can stop a step: then parts of the batch may go ahead of others."""
    sizes, last = sequence.sizes, sequence.ids[0]
    growth = sizes.steps * sizes.growth
    return (
        store.extent + growth <= store.num_slots  # no lap ends
        and not is_barred(store, growth + sizes.growth)  # also of a step after the last
        and bool((last >= 0).all() and (last < store.rows.shape[1]).all())
    )


def is_long(store: EpisodeStore, growth: int) -> bool:
    """Whether rows have to be found by trees once as many more are touched."""
    stop = min(store.extent + growth, store.num_slots)
    return store.trees is not None and stop >= store.trees.minimum


def is_barred(store: EpisodeStore, growth: int) -> bool:
    """Whether a step is long for which there is no code."""
    return is_long(store, growth) and not can_find(store.rows.dtype)


def reserve(store: EpisodeStore, sizes: Sizes) -> None:
    """Make room for a step, in the table and in the trees of rows."""
    extent, trees = store.extent + sizes.growth, store.trees
    store.reserve(extent)
    if trees is not None and is_long(store, sizes.growth):
        entering = extent - int(trees.entered.min())
        trees.reserve(store.rows.shape[1], entering, sizes.heads * (sizes.top_k + 1))


def rows_allowed(store: EpisodeStore) -> int:
    """Up to how many touched rows the kernel goes on."""
    capacity = store.rows.shape[1]
    return capacity if capacity < store.num_slots else EVERYTHING


def searching(
    store: EpisodeStore, sizes: Sizes, taken: int
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Up to how many touched rows the kernel goes on; from where on it finds rows by trees, how,
    and the trees' sizes; their addresses, if any.
    """
    allowed, trees, scanning = rows_allowed(store), store.trees, (EVERYTHING, *[0] * 6)
    if trees is None or not is_long(store, (sizes.steps - taken) * sizes.growth):
        return allowed, scanning, ()
    if not can_find(store.rows.dtype):
        return min(allowed, trees.minimum - 1), scanning, ()
    _, _, _, *nodes = trees.tables.sizes
    return allowed, (trees.minimum, *trees.effort(sizes.top_k), *nodes), trees.tables.places


def run(
    kernels: Kernels,
    store: EpisodeStore,
    sequence: Sequence,
    weights: tuple[Tensor, ...],
    parts: list[tuple[int, int, int]],
    time: int,
) -> list[int]:
    """Steps of each part of the batch (begin, end, from which step on), until they stop; how many
    there are then. The first step is that at `time`.
    """
    order, sizes, capacity = store.order, sequence.sizes, store.rows.shape[1]
    touched, pointer, kept = (part.clone() for part in (store.touched, order.pointer, order.kept))
    bits, before = GRID_BITS[store.rows.dtype], min(first for *_, first in parts)
    allowed, found, tables = searching(store, sizes, before)
    state = (store.rows, store.norms, touched, order.last_access, order.lap, order.lap_start)
    places = addresses(*state, pointer, kept, *weights, *sequence.records)

    used = (state, pointer, kept, weights, sequence, store.trees and store.trees.tables)

    def part(begin: int, end: int, first: int, _: Any = used) -> int:
        limits = (capacity, store.num_slots, bits, time, allowed, first, *found, begin, end)
        return int(kernels.unroll(kernels.like, (*sizes, *limits), places, tables))

    store.version += 1  # before rows are changed: where that is interrupted, no state fits them
    now = at_once(part, parts)
    store.version -= now == [first for *_, first in parts]
    store.touched, store.extent = touched, int(touched.max())
    order.pointer, order.kept, order.time = pointer, kept, time + min(now)
    return now


def go_back(kernels: Kernels, sizes: Sizes, buffer: Tensor, *tensors: Tensor) -> None:
    """All steps backward, in place: see `unroll_backward` for the tensors behind the buffer."""
    places = addresses(buffer, *tensors)

    def part(begin: int, end: int, _: Any = (buffer, *tensors)) -> None:
        kernels.unroll_backward(kernels.like, (*sizes, buffer.shape[1], begin, end), places)

    in_parts(part, sizes.batch, sizes.work * sizes.steps)


class UnrolledSteps(torch.autograd.Function):
    """A sequence that was taken, in the graph: what was carried [T + 1, B, F], the last cell
    state [B, D], the last read weights [B, H, K], token.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        gates: Tensor,
        carried: Tensor,
        cell: Tensor,
        last_weights: Tensor,
        recurrent: Tensor,
        interface: Tensor,
        bias: Tensor,
        sequence: Sequence,
        tape: Tape,
    ) -> tuple[Tensor, ...]:
        """Record what the backward pass needs."""
        ctx.run, ctx.sizes, ctx.support = sequence.backward, sequence.sizes, last_weights.shape[2]
        ctx.tape, ctx.operation = tape, tape.record()
        made = sequence
        saved = (made.gates, made.cells, made.values, made.write_ids, made.ids, made.weights)
        ctx.save_for_backward(recurrent, interface, made.carried, *saved, made.rows)
        ctx.set_materialize_grads(False)
        return made.carried, made.cells[-1].clone(), made.weights[-1].clone(), token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_carried: Any, to_cell: Any, to_weights: Any, _: Any) -> Any:
        """Backward through the steps, on the tape's buffer; then the weights, all steps at once."""
        recurrent, interface, carried, *saved = ctx.saved_tensors
        gates, cells, values, _, ids, weights, _ = saved
        sizes, buffer = ctx.sizes, ctx.tape.enter(ctx.operation)
        to_carried = own(to_carried, carried)
        to_cell, both = own(to_cell, cells[0]), torch.zeros_like(weights[:1]).repeat(2, 1, 1, 1)
        if to_weights is not None:
            both[sizes.steps % 2] = to_weights
        to_gates, to_values = torch.empty_like(gates), torch.empty_like(values)
        flows = (to_carried, to_cell, both, to_gates, to_values)
        layers = (recurrent.contiguous(), interface.contiguous())
        ctx.run(sizes, buffer, *layers, *saved, *flows)
        ctx.tape.added(ids[1:].transpose(0, 1))
        ctx.tape.leave(ctx.operation)
        to_state = (to_gates, to_carried[0], to_cell, both[0, :, :, : ctx.support])
        hidden, needed = carried[1:, :, : sizes.hidden], ctx.needs_input_grad
        to_recurrent = summed(to_gates, carried[:-1]) if needed[5] else None
        to_interface = summed(to_values, hidden) if needed[6] else None
        to_bias = to_values.sum((0, 1)) if needed[7] else None
        return None, *to_state, to_recurrent, to_interface, to_bias, None, None


def own(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient that may be changed; zeros for None."""
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.clone(memory_format=torch.contiguous_format)


def summed(gradient: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of a weight [J, I], out of those of outputs [T, B, J] and inputs [T, B, I]."""
    return gradient.flatten(0, 1).mT @ inputs.flatten(0, 1)
