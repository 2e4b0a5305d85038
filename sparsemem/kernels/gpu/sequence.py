"""Many steps of SAM with its LSTM by Triton's kernels and torch's products, as one operation of
the tape. The host only launches: what is made at each step has its place beforehand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemem.indexes.launching import launch
from sparsemem.kernels.gpu import step
from sparsemem.kernels.gpu.lstm import lstm_backward_kernel, lstm_kernel
from sparsemem.kernels.gpu.step import (
    Reading,
    backward_step,
    can_step,
    padded,
    read_step,
    search_step,
    write_step,
)
from sparsemem.kernels.sequence import Layers, Sequence, Sizes, begun, sizes_of
from sparsemem.memory.entries import Entries

if TYPE_CHECKING:
    from sparsemem.memory.store import EpisodeStore

HIDDEN_BLOCK = 128  # units of the LSTM that a program works on


def can_unroll(store: EpisodeStore, last: Entries, top_k: int) -> bool:
    """Whether the next steps can be taken by `device_sequence`."""
    return last.ids.shape[2] in (0, top_k) and can_step(store, last.weights, last, top_k)


def device_sequence(
    store: EpisodeStore,
    gates: Tensor,
    carried: Tensor,
    cell: Tensor,
    last: Entries,
    top_k: int,
    layers: Layers,
) -> Sequence:
    """As `take_sequence`; where the host must not see what is touched."""
    last = filled(last, top_k)
    sizes = sizes_of(store, gates, cell, last, layers)
    sequence = begun(go_back, sizes, gates, carried, cell, last)
    store.reserve(store.extent + sizes.steps * sizes.growth)
    with torch.cuda.device_of(gates):  # type: ignore[no-untyped-call]
        advance(store, sequence, layers)
    return sequence


def filled(last: Entries, top_k: int) -> Entries:
    """Last reads [B, H, K]: where there are none yet, rows that heads touch anyway, with weight 0.

    After H fresh rows of a step, rows 0 .. H - 1 are touched.
    """
    if last.ids.shape[2] == top_k:
        return last
    batch, heads, _ = last.ids.shape
    head = torch.arange(heads, device=last.ids.device).view(1, heads, 1)
    weights = last.weights.new_zeros(batch, heads, top_k)
    return Entries(head.repeat(batch, 1, top_k), weights)


def advance(store: EpisodeStore, sequence: Sequence, layers: Layers) -> None:
    """Take all steps."""
    sizes, kernels = sequence.sizes, kernels_of(sequence.sizes, sequence.gates)
    recurrent, interface = layers.recurrent.mT, layers.interface.mT
    sequence.values.copy_(layers.bias)  # which the products are added to
    touched = store.touched.new_empty(sizes.steps, sizes.batch)
    room, no_links = room_for_keys(store, sizes), (store.touched[:0], sequence.gates[:0, 0, 0])
    for t in range(sizes.steps):
        gates, values = sequence.gates[t], sequence.values[t]
        last = Entries(sequence.ids[t], sequence.weights[t])
        write = Entries(sequence.write_ids[t], sequence.write_weights)
        hidden, reads = sequence.carried[t + 1].tensor_split([sizes.hidden], 1)
        read = Reading(sequence.ids[t + 1], sequence.rows[t], sequence.weights[t + 1], reads)
        gates.addmm_(sequence.carried[t], recurrent)
        launch(
            lstm_kernel, lstm_grid(sizes),
            gates, sequence.cells[t], sequence.cells[t + 1], hidden, hidden.stride(0),
            **lstm_options(sizes),
        )  # fmt: skip
        values.addmm_(hidden, interface)
        write_step(kernels, store, values, last, write, touched[t])
        keys = search_step(kernels, store, values, touched[t], room)
        read_step(kernels, store, values, last, write, read, keys, *no_links)


def room_for_keys(store: EpisodeStore, sizes: Sizes) -> Tensor:
    """For what a search of any of the steps finds."""
    rows, searches = store.extent + sizes.steps * sizes.growth, sizes.batch * sizes.heads
    parts = step.parts_of(rows + sizes.top_k, searches)
    return store.touched.new_empty(searches * parts * sizes.top_k)


def kernels_of(sizes: Sizes, like: Tensor) -> step.Sizes:
    """What the kernels of the memory are compiled for."""
    return step.Sizes(like.dtype, sizes.heads, sizes.inputs, sizes.width, sizes.top_k, False)


def lstm_options(sizes: Sizes) -> dict[str, Any]:
    """What the LSTM's kernels are compiled for."""
    block = min(padded(sizes.hidden), HIDDEN_BLOCK)
    return {"SIZE": sizes.hidden, "BLOCK": block, "num_warps": max(1, block // 32)}


def lstm_grid(sizes: Sizes) -> tuple[int, int]:
    """Programs of the LSTM's kernels."""
    return sizes.batch, -(-sizes.hidden // HIDDEN_BLOCK)


def go_back(
    sizes: Sizes,
    buffer: Tensor,
    recurrent: Tensor,
    interface: Tensor,
    gates: Tensor,
    cells: Tensor,
    values: Tensor,
    write_ids: Tensor,
    ids: Tensor,
    weights: Tensor,
    rows: Tensor,
    to_carried: Tensor,
    to_cell: Tensor,
    to_weights: Tensor,
    to_gates: Tensor,
    to_values: Tensor,
) -> None:
    """All steps backward, in place, as `unroll_backward` of ../unroll.py."""
    kernels, to_rows, links = kernels_of(sizes, gates), torch.empty_like(rows[0]), gates[:0]
    with torch.cuda.device_of(buffer):  # type: ignore[no-untyped-call]
        for t in range(sizes.steps - 1, -1, -1):
            to_hidden, to_reads = to_carried[t + 1].tensor_split([sizes.hidden], 1)
            made = (values[t], weights[t], write_ids[t], ids[t + 1], links, rows[t], weights[t + 1])
            flows = (to_reads, to_weights[(t + 1) % 2], to_rows, to_values[t], to_weights[t % 2])
            backward_step(kernels, buffer, *made, *flows)
            to_hidden.addmm_(to_values[t], interface)
            launch(
                lstm_backward_kernel, lstm_grid(sizes),
                gates[t], cells[t], cells[t + 1], to_hidden, to_cell, to_gates[t],
                to_hidden.stride(0), **lstm_options(sizes),
            )  # fmt: skip
            to_carried[t].addmm_(to_gates[t], recurrent)
