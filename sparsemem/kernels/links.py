"""Temporal links, compiled: `TemporalLinks.update` and `follow` of sparsemem.memory.links.

Functions are for one head of one element of the batch, but for the one in ENTRIES. Vectors are
sparse: ids and weights. L links are kept of a row.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np

from sparsemem.kernels.compiled import array_at, clear, insert, kernel, part


@part
def cell_of(weight, scale):
    """What a weight is ranked by: its place on the grid; zeros come behind all other weights."""
    if weight == 0:
        return -scale
    cell = np.rint(scale * weight)
    return np.inf if np.isnan(cell) else cell


@part
def collected(ids, weights):
    """The weights with those of repeated ids added to the first of them."""
    total = weights.copy()
    for entry in range(len(ids)):
        for earlier in range(entry):
            if ids[earlier] == ids[entry]:
                total[earlier] += total[entry]
                total[entry] = 0
                break
    return total


@part
def is_first(ids, entry):
    """Whether no entry before has the same id."""
    earlier = 0
    while ids[earlier] != ids[entry]:
        earlier += 1
    return earlier == entry


@part
def mix_in(ids, weights, keep, other_ids, others, factor, scale, cells, all_ids, sums):
    """keep * row + factor * other, cut to the L largest entries; the row is overwritten.

    No id of `other` has two weights that are not zero. The last three are room for work.
    """
    size, found = len(ids), 0
    for other in range(len(others)):
        all_ids[size + other], sums[size + other] = other_ids[other], factor * others[other]
    for entry in range(size):
        all_ids[entry], sums[entry] = ids[entry], keep * weights[entry]
        for other in range(size, size + len(others)):
            if all_ids[other] == ids[entry]:
                sums[entry] += sums[other]
                sums[other] = 0
    for entry in range(size + len(others)):
        cell = cell_of(sums[entry], scale)
        found, place = insert(cells, ids, found, cell, all_ids[entry])
        if place >= 0:
            for later in range(found - 1, place, -1):
                weights[later] = weights[later - 1]
            weights[place] = sums[entry]


@part
def update(follows_ids, follows, precedes_ids, precedes, before_ids, before, ids, weights, scale):
    """Link what was written behind what was written before, but for the decay of `precedes`."""
    keep, room = weights.dtype.type(1), len(before) + max(len(before), len(ids))
    cells, all_ids, sums = np.empty(len(before)), np.empty(room, np.int64), np.empty(room)
    written, earlier = collected(ids, weights), collected(before_ids, before)
    for entry in range(len(ids)):
        if is_first(ids, entry):
            at, id = written[entry], ids[entry]
            row, links = follows_ids[id], follows[id]
            mix_in(row, links, keep - at, before_ids, earlier, at, scale, cells, all_ids, sums)
    for entry in range(len(before_ids)):
        if is_first(before_ids, entry):
            at, id = earlier[entry], before_ids[entry]
            row, links = precedes_ids[id], precedes[id]
            mix_in(row, links, keep, ids, written, at, scale, cells, all_ids, sums)
    left = keep - weights.sum()
    mix_in(before_ids, before, left, ids, written, keep, scale, cells, all_ids, sums)


@part
def decay(table_ids, table, ids, weights, dense):
    """Entries at what was written lose as much as was written there. `dense` is zero."""
    for entry in range(len(ids)):
        dense[ids[entry]] += weights[entry]
    for row in range(len(table)):
        for link in range(table.shape[1]):
            table[row, link] *= 1 - dense[np.uint64(table_ids[row, link])]
    for id in ids:
        dense[id] = 0


@part
def follow(table_ids, table, ids, weights, dense, scale, chosen, weights_of):
    """The K largest entries of the table times a vector, and how they depend on the vector's
    entries: weights_of [K, S]. `dense` is zero.
    """
    for entry in range(len(ids)):
        dense[ids[entry]] += weights[entry]
    k, found, cells = len(chosen), 0, np.empty(len(chosen))
    for row in range(len(table)):
        total = table.dtype.type(0)
        for link in range(table.shape[1]):
            total += table[row, link] * dense[np.uint64(table_ids[row, link])]
        cell = cell_of(total, scale)
        if found < k or cell > cells[k - 1]:
            found, _ = insert(cells, chosen, found, cell, row)
    for place in range(k):
        row, total = chosen[place], table.dtype.type(0)
        for link in range(table.shape[1]):
            total += table[row, link] * dense[np.uint64(table_ids[row, link])]
        clear(weights_of[place])
        if total > 0:
            for entry in range(len(ids)):
                for link in range(table.shape[1]):
                    if table_ids[row, link] == ids[entry]:
                        weights_of[place, entry] += table[row, link]
    for id in ids:
        dense[id] = 0


@kernel
def links_step(like, sizes, addresses):
    """Update the links, then follow them from the last reads: ids [B, H, 3K] to read, of which
    the content's are given, and weights_of [B, H, 2, K, S]. For elements begin .. end - 1.
    """
    batch, heads, size, written, support, k, capacity, grid_bits, begin, end = sizes
    whole, scale = np.empty(0, np.int64), 2.0**grid_bits
    tables, vectors = (batch, heads, capacity, size), (batch, heads, size)
    touched = array_at(addresses[0], whole, (batch,))
    follows_ids = array_at(addresses[1], whole, tables)
    follows = array_at(addresses[2], like, tables)
    precedes_ids = array_at(addresses[3], whole, tables)
    precedes = array_at(addresses[4], like, tables)
    before_ids = array_at(addresses[5], whole, vectors)
    before = array_at(addresses[6], like, vectors)
    write_ids = array_at(addresses[7], whole, (batch, heads, written))
    write_weights = array_at(addresses[8], like, (batch, heads, written))
    last_ids = array_at(addresses[9], whole, (batch, heads, support))
    last_weights = array_at(addresses[10], like, (batch, heads, support))
    content = array_at(addresses[11], whole, (batch, heads, k))
    ids = array_at(addresses[12], whole, (batch, heads, 3, k))
    weights_of = array_at(addresses[13], like, (batch, heads, 2, k, support))
    dense = np.zeros(capacity, like.dtype)
    for b in range(begin, end):
        count = max(touched[b], k)
        for h in range(heads):
            to_ids, to = follows_ids[b, h, :count], follows[b, h, :count]
            from_ids, back = precedes_ids[b, h, :count], precedes[b, h, :count]
            decay(from_ids, back, write_ids[b, h], write_weights[b, h], dense)
            update(
                to_ids, to, from_ids, back, before_ids[b, h], before[b, h], write_ids[b, h],
                write_weights[b, h], scale,
            )  # fmt: skip
            last_id, last = last_ids[b, h], last_weights[b, h]
            follow(from_ids, back, last_id, last, dense, scale, ids[b, h, 0], weights_of[b, h, 0])
            ids[b, h, 1] = content[b, h]
            follow(to_ids, to, last_id, last, dense, scale, ids[b, h, 2], weights_of[b, h, 1])


ENTRIES: dict[Any, tuple[int, ...]] = {links_step: (10, 14)}  # sizes and addresses
