"""Many steps of SAM with its LSTM at once, forward and backward, compiled.

Made of the functions in controller.py, steps.py and gradients.py; what a step needs again on the
way back is kept in arrays [T, ..]. Shape letters as there; F = D + H W, what is carried from a
step to the next: hidden state and reads.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np

from sparsemem.kernels.compiled import array_at, assign, clear, kernel
from sparsemem.kernels.controller import add_product, lstm, lstm_backward
from sparsemem.kernels.gradients import read_backward, write_backward
from sparsemem.kernels.steps import (
    LAP_ENDED,
    choose_fresh,
    in_range,
    mark,
    rank,
    read,
    write,
)
from sparsemem.kernels.tree import has_room, propose_ahead, tree_of, trees_at, update


@kernel
def unroll(like, sizes, addresses, tables):
    """Steps `first` .. T - 1 of elements begin .. end - 1; how many are taken then.

    It stops before a step that might touch rows beyond `allowed`, or for which a lap holds too few
    slots or a tree too few nodes, or whose last reads are out of place. Elements that have touched
    `minimum` rows find them by their trees; where `tables`, the addresses of these, are (), all
    rows are scanned, and Numba leaves out what is behind `len(tables) > 0`.
    """
    steps, batch, heads, width, inputs, k, hidden = sizes[:7]
    capacity, num_slots, grid_bits, time, allowed, first = sizes[7:13]
    minimum, proposed, groups, lists, node_size, node_lists, node_groups, begin, end = sizes[13:]
    whole, features, scale = np.empty(0, np.int64), hidden + heads * width, 2.0**grid_bits
    rows = array_at(addresses[0], like, (batch, capacity, width))
    norms = array_at(addresses[1], like, (batch, capacity))
    touched = array_at(addresses[2], whole, (batch,))
    last_access = array_at(addresses[3], whole, (batch, capacity))
    lap = array_at(addresses[4], whole, (batch, num_slots if addresses[4] else 0))
    lap_start = array_at(addresses[5], whole, (batch,))
    start = array_at(addresses[6], whole, (batch,))
    kept = array_at(addresses[7], whole, (batch, heads))
    recurrent = array_at(addresses[8], like, (features, 4 * hidden))
    interface = array_at(addresses[9], like, (hidden, heads * inputs))
    bias = array_at(addresses[10], like, (heads * inputs,))
    gates = array_at(addresses[11], like, (steps, batch, 4 * hidden))
    cells = array_at(addresses[12], like, (steps + 1, batch, hidden))
    carried = array_at(addresses[13], like, (steps + 1, batch, features))
    flat = array_at(addresses[14], like, (steps, batch, heads * inputs))
    values = array_at(addresses[14], like, (steps, batch, heads, inputs))
    write_ids = array_at(addresses[15], whole, (steps, batch, heads, k + 1))
    write_weights = array_at(addresses[16], like, (batch, heads, k + 1))
    ids = array_at(addresses[17], whole, (steps + 1, batch, heads, k))
    weights = array_at(addresses[18], like, (steps + 1, batch, heads, k))
    read_rows = array_at(addresses[19], like, (steps, batch, heads, k, width))
    links = array_at(addresses[18], like, (heads, 2, 0, k))  # of SDNC
    shape = (batch, width, capacity, node_size, node_lists, node_groups)
    if len(tables) > 0:
        trees = trees_at(shape, tables)
    candidates, code = np.empty((heads, proposed), np.int64), np.empty(width, np.int16)
    fresh, next_start = np.empty_like(kept), np.empty_like(start)
    for t in range(first, steps):
        for b in range(begin, end):
            laps = lap[b] if lap_start[b] else lap[b, :0]
            next_start[b] = choose_fresh(
                kept[b], laps, lap_start[b], start[b], last_access[b], num_slots, fresh[b]
            )
            if (
                touched[b] + heads + k > allowed
                or next_start[b] == LAP_ENDED
                or not in_range(fresh[b], capacity)
                or not in_range(ids[t, b], capacity)
            ):
                return t
            if len(tables) > 0 and touched[b] + heads + k >= minimum:
                entering = touched[b] + heads + k - trees.entered[b, 0]
                if not has_room(tree_of(trees, b), entering, write_ids[t, b].size):
                    return t
        add_product(carried[t], recurrent, gates[t], begin, end)
        for b in range(begin, end):
            assign(kept[b], fresh[b])
            start[b] = next_start[b]
            lstm(gates[t, b], cells[t, b], cells[t + 1, b], carried[t + 1, b])
            assign(flat[t, b], bias)
        add_product(carried[t + 1], interface, flat[t], begin, end)
        for b in range(begin, end):
            stop = write(
                rows[b], norms[b], values[t, b], width, ids[t, b], weights[t, b], fresh[b],
                write_ids[t, b], write_weights[b],
            )  # fmt: skip
            touched[b] = max(touched[b], stop)
            visible, entered, found = min(touched[b] + k, num_slots), 0, candidates[:, :0]
            if len(tables) > 0 and touched[b] >= minimum:
                entered, found = min(touched[b], num_slots - k), candidates[:, :]
                tree = tree_of(trees, b)
                update(tree, write_ids[t, b], touched[b], rows[b], norms[b], code)
                propose_ahead(
                    tree, values[t, b], width, groups, lists, k, rows[b], norms[b], found, code
                )
            for head in range(heads):
                rank(
                    rows[b], norms[b], found[head], entered, visible, values[t, b, head, :width],
                    scale, ids[t + 1, b, head],
                )  # fmt: skip
            read(
                rows[b], values[t, b], width, ids[t + 1, b], links, weights[t, b],
                read_rows[t, b], weights[t + 1, b],
                carried[t + 1, b, hidden:].reshape(heads, width),
            )  # fmt: skip
            stop = mark(
                last_access[b], time + t, write_ids[t, b], write_weights[b], ids[t + 1, b],
                weights[t + 1, b],
            )  # fmt: skip
            touched[b] = max(touched[b], stop)
    return steps


@kernel
def unroll_backward(like, sizes, addresses):
    """Steps T - 1 .. 0 for elements begin .. end - 1.

    The gradients of what was carried, `to_carried`, come in as those of the features, and that of
    the last cell in `to_cell`, of the last read weights in `to_weights[T % 2]`; they leave, for
    what was there before the first step, in row 0 of each.
    """
    steps, batch, heads, width, inputs, k, hidden, capacity, begin, end = sizes
    whole, features = np.empty(0, np.int64), hidden + heads * width
    buffer = array_at(addresses[0], like, (batch, capacity, width))
    recurrent = array_at(addresses[1], like, (4 * hidden, features))
    interface = array_at(addresses[2], like, (heads * inputs, hidden))
    gates = array_at(addresses[3], like, (steps, batch, 4 * hidden))
    cells = array_at(addresses[4], like, (steps + 1, batch, hidden))
    values = array_at(addresses[5], like, (steps, batch, heads, inputs))
    write_ids = array_at(addresses[6], whole, (steps, batch, heads, k + 1))
    ids = array_at(addresses[7], whole, (steps + 1, batch, heads, k))
    weights = array_at(addresses[8], like, (steps + 1, batch, heads, k))
    rows = array_at(addresses[9], like, (steps, batch, heads, k, width))
    to_carried = array_at(addresses[10], like, (steps + 1, batch, features))
    to_cell = array_at(addresses[11], like, (batch, hidden))
    to_weights = array_at(addresses[12], like, (2, batch, heads, k))
    to_gates = array_at(addresses[13], like, (steps, batch, 4 * hidden))
    to_flat = array_at(addresses[14], like, (steps, batch, heads * inputs))
    to_values = array_at(addresses[14], like, (steps, batch, heads, inputs))
    links = array_at(addresses[8], like, (2, 0, k))  # of SDNC
    for t in range(steps - 1, -1, -1):
        given, left = to_weights[(t + 1) % 2], to_weights[t % 2]
        for b in range(begin, end):
            clear(to_flat[t, b])
            for h in range(heads):
                clear(left[b, h])
                from_row = hidden + h * width
                read_backward(
                    buffer[b], values[t, b, h], width, ids[t + 1, b, h], links, weights[t, b, h],
                    rows[t, b, h], weights[t + 1, b, h],
                    to_carried[t + 1, b, from_row : from_row + width], given[b, h],
                    to_values[t, b, h], left[b, h],
                )  # fmt: skip
            write_backward(
                buffer[b], values[t, b], width, write_ids[t, b], weights[t, b], to_values[t, b],
                left[b],
            )  # fmt: skip
        add_product(to_flat[t], interface, to_carried[t + 1], begin, end)
        for b in range(begin, end):
            lstm_backward(
                gates[t, b], cells[t, b], cells[t + 1, b], to_carried[t + 1, b], to_cell[b],
                to_gates[t, b],
            )  # fmt: skip
        add_product(to_gates[t], recurrent, to_carried[t], begin, end)


# Sizes and addresses, and those of `trees_at`, which take as long again to compile.
ENTRIES: dict[Any, tuple[int, ...]] = {unroll: (22, 20, 0), unroll_backward: (10, 15)}
WITH_TREES = {unroll: (22, 20, 16)}
