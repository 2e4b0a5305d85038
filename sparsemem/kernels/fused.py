"""A memory step by compiled kernels, as one operation of the tape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemem.indexes.ranking import GRID_BITS
from sparsemem.indexes.triton_switch import use_triton
from sparsemem.kernels import Kernels, kernels_for
from sparsemem.kernels.threads import in_parts
from sparsemem.memory.entries import Entries

if TYPE_CHECKING:
    from sparsemem.memory.links import TemporalLinks
    from sparsemem.memory.store import EpisodeStore
    from sparsemem.memory.tape import Tape

LAP_ENDED = -1  # as in steps.py
LINK_PASSES = 8  # what a link of a row costs a step, in products of a dense vector


class Step(NamedTuple):
    """What a step of H heads did to B elements: `take_step`."""

    backward: Callable[..., tuple[Tensor, Tensor]]  # as `backward_step`, of kernels
    write: Entries  # [B, H, S + 1]
    read: Entries  # [B, H, R]
    links: Tensor  # weights of the rows linked with the last reads, [B, H, 2, K, S]
    rows: Tensor  # that were read, [B, H, R, W]
    reads: Tensor  # [B, H * W]


def take_step(
    store: EpisodeStore, values: Tensor, last: Entries, top_k: int, links: TemporalLinks | None
) -> Step | None:
    """Write, search, read and mark accesses; None, and nothing done, where no kernel can do it.

    Args:
        store: the memory, changed in place.
        values: interface values [B, H * I] of one step, contiguous.
        last: reads of the step before [B, H, S].
        top_k: K, rows to read by content.
        links: SDNC's; changed in place.
    """
    if use_triton(values):
        from sparsemem.kernels.gpu.step import device_step

        return device_step(store, values, last, top_k, links)
    kernels = None
    if can_step(store, values, last):
        kernels = kernels_for(values.dtype, links is not None)
    if kernels is None:
        return None
    store.reserve(store.extent + last.ids.shape[1] + top_k)
    write = write_step(kernels, store, values, last, top_k)
    if write is None:
        return None
    ids = search_step(kernels, store, values, top_k, write.ids.shape[1])
    linked = values.new_empty(0)
    if links is not None:
        ids, linked = links_step(kernels, store, links, write, last, ids)
    return read_step(kernels, store, values, last, write, ids, linked)


def can_step(store: EpisodeStore, values: Tensor, last: Entries) -> bool:
    """Whether what a step needs is where, and as, the kernels expect it."""
    heads, kept = last.ids.shape[1], store.order.kept.shape[1]
    return (
        store.has_prefix
        and values.device.type == "cpu"
        and values.dtype == store.rows.dtype == last.weights.dtype
        and kept in (0, heads)
        and type(values) is Tensor  # a tensor that is only being traced has no numbers
    )


def write_step(
    kernels: Kernels, store: EpisodeStore, values: Tensor, last: Entries, spare: int
) -> Entries | None:
    """Choose fresh rows, erase them, write; what was written, or None and nothing done."""
    order, (batch, heads, support) = store.order, last.ids.shape
    fresh = last.ids.new_empty(batch, heads)
    start, touched = torch.empty_like(order.pointer), torch.empty_like(store.touched)
    ids = last.ids.new_empty(batch, heads, support + 1)
    weights = values.new_empty(batch, heads, support + 1)
    given, made = (values, last.ids, last.weights), (fresh, start, touched, ids, weights)

    def run() -> int:
        capacity, width = store.rows.shape[1:]
        shape = (batch, heads, width, values.shape[1] // heads, support)
        sizes = (*shape, capacity, store.num_slots, spare, order.kept.shape[1])
        state = (store.rows, store.norms, store.touched, order.last_access, order.lap)
        places = addresses(*state, order.lap_start, order.pointer, order.kept, *given, *made)
        return kernels.write_step(kernels.like, sizes, places)  # type: ignore[no-any-return]

    extent = run()
    if extent == LAP_ENDED:
        order.least_recent(heads)  # begins a lap, from which the kernel goes on
        extent = run()
    if extent < 0:
        return None
    order.kept, order.pointer, store.touched, store.extent = fresh, start, touched, extent
    store.version += 1
    if store.trees is not None:
        store.trees.update(ids.flatten(1), store.rows, store.norms)
    return Entries(ids, weights)


def search_step(
    kernels: Kernels, store: EpisodeStore, values: Tensor, top_k: int, heads: int
) -> Tensor:
    """Ids [B, H, K] of the rows to read by content."""
    batch, capacity, width = store.rows.shape
    ids = store.touched.new_empty(batch, heads, top_k)
    inputs, bits = values.shape[1] // heads, GRID_BITS[values.dtype]
    start, candidates = 0, ids[:, :, :0]
    if store.absorb():
        queries = values.view(batch, heads, inputs)[:, :, :width]
        start, candidates = store.propose(queries, top_k)
    shape = (batch, heads, width, inputs, top_k, capacity, store.num_slots, bits, start)
    tensors = (store.rows, store.norms, store.touched, values, ids, candidates)
    sizes, places = (*shape, candidates.shape[2]), addresses(*tensors)

    def run(begin: int, end: int, _: Any = tensors) -> None:
        kernels.search_step(kernels.like, (*sizes, begin, end), places)

    in_parts(run, batch, batch * heads * (store.extent - start) * width)
    return ids


def read_step(
    kernels: Kernels,
    store: EpisodeStore,
    values: Tensor,
    last: Entries,
    write: Entries,
    ids: Tensor,
    links: Tensor,
) -> Step:
    """Read at ids [B, H, R], and end the step: mark what was accessed."""
    (batch, heads, support), entries = last.ids.shape, ids.shape[2]
    capacity, width = store.rows.shape[1:]
    rows = values.new_empty(batch, heads, entries, width)
    weights, reads = values.new_empty(ids.shape), values.new_empty(batch, heads * width)
    inputs, order = values.shape[1] // heads, store.order
    linked = links.shape[3] if links.ndim > 1 else 0
    sizes = (batch, heads, width, inputs, support, entries, linked, capacity, order.time)
    given = (store.rows, store.touched, order.last_access, values, last.weights, *write, ids, links)
    places = addresses(*given, rows, weights, reads)
    store.extent = kernels.read_step(kernels.like, sizes, places)
    order.time += 1
    backward = partial(backward_step, kernels)
    return Step(backward, write, Entries(ids, weights), links, rows, reads)


def links_step(
    kernels: Kernels,
    store: EpisodeStore,
    links: TemporalLinks,
    write: Entries,
    last: Entries,
    content: Tensor,
) -> tuple[Tensor, Tensor]:
    """Update the links; ids [B, H, 3K] to read and weights [B, H, 2, K, S] of the linked ones."""
    batch, heads, k = content.shape
    links.reserve(max(store.extent, k))
    support, capacity = last.ids.shape[2], links.follows.ids.shape[2]
    ids = content.new_empty(batch, heads, 3 * k)
    weights_of = write.weights.new_empty(batch, heads, 2, k, support)
    size, bits = links.precedence.ids.shape[2], GRID_BITS[weights_of.dtype]
    sizes = (batch, heads, size, support + 1, support, k, capacity, bits)
    tables = (*links.follows, *links.precedes, *links.precedence)
    tensors = (store.touched, *tables, *write, *last, content, ids, weights_of)
    places = addresses(*tensors)

    def run(begin: int, end: int, _: Any = tensors) -> None:
        kernels.links_step(kernels.like, (*sizes, begin, end), places)

    in_parts(run, batch, batch * heads * store.extent * size * LINK_PASSES)
    return ids, weights_of


def backward_step(
    kernels: Kernels,
    buffer: Tensor,
    values: Tensor,
    last_weights: Tensor,
    write_ids: Tensor,
    ids: Tensor,
    links: Tensor,
    rows: Tensor,
    weights: Tensor,
    to_reads: Tensor | None,
    to_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the values and of the last read weights; that of the rows is in the buffer.

    Args:
        buffer: gradient of the rows after the step; afterwards, of those before it.
        values, last_weights: what the step was given.
        write_ids, ids, links, rows, weights: what it did, see `Step`.
        to_reads: gradient of the reads, or None: zero.
        to_weights: gradient of the read weights, or None: zero.
    """
    batch, heads, entries, width = rows.shape
    to_values, to_last = torch.empty_like(values), torch.empty_like(last_weights)
    given = [part if part is None else part.contiguous() for part in (to_reads, to_weights)]
    linked = links.shape[3] if links.ndim > 1 else 0
    sizes = (batch, heads, width, values.shape[1] // heads, last_weights.shape[2], entries)
    tensors = (buffer, values, write_ids, last_weights, ids, links, rows, weights, *given)
    kernels.backward_step(
        kernels.like,
        (*sizes, linked, buffer.shape[1]),
        addresses(*tensors, to_values, to_last),
    )
    return to_values, to_last


def addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    """Where contiguous tensors are; 0 for None."""
    return tuple([0 if tensor is None else tensor.data_ptr() for tensor in tensors])


class FusedStep(torch.autograd.Function):
    """A step that was taken, in the graph: reads [B, H * W], read weights [B, H, R], token."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, values: Tensor, last_weights: Tensor, step: Step, tape: Tape
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Record what the backward pass needs."""
        ctx.run, ctx.tape, ctx.operation = step.backward, tape, tape.record()
        weights = step.read.weights
        ctx.save_for_backward(
            values, last_weights, step.write.ids, step.read.ids, step.links, step.rows, weights
        )
        ctx.set_materialize_grads(False)
        return step.reads, weights, token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_reads: Any, to_weights: Any, _: Any) -> Any:
        """Through the reads into the buffer, then through the write out of it."""
        buffer = ctx.tape.enter(ctx.operation)
        to_values, to_last = ctx.run(buffer, *ctx.saved_tensors, to_reads, to_weights)
        ctx.tape.added(ctx.saved_tensors[3])
        ctx.tape.leave(ctx.operation)
        return None, to_values, to_last, None, None
