"""The memory step of SAM and SDNC, forward and backward, compiled.

The kernels work on the memory of torch's tensors, which they are given as addresses: that saves
an array object for each tensor of each step. `like` is an empty array of the dtype that is
computed in. Functions are for one element of the batch, but for those with ENTRIES, which are
called from Python.

Shape letters beside those of docs/architecture.md: S entries of the last read weights, U = S + 1
entries written, R entries read (K, or 3K with temporal links), I interface values of a head, C
rows that there is room for.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from sparsemem.kernels.compiled import (
    add_scaled,
    array_at,
    assign,
    clear,
    content_weights,
    dot,
    insert,
    inverse_norm,
    kernel,
    part,
    sigmoid,
    softmax,
)
from sparsemem.memory.usage import ACCESS_THRESHOLD

GATES = 3  # strength, write gate and interpolation, behind query and word; then the modes

LAP_ENDED, OUT_OF_PLACE = -1, -2  # why a step was not taken


@part
def choose_fresh(kept, lap, lap_start, start, last_access, num_slots, chosen):
    """The next slots of a lap that were not accessed since: see `AccessOrder`.

    Where the next search of the lap begins; LAP_ENDED when it holds too few. An empty `lap`
    lists the slots by their ids.
    """
    count, capacity, found = len(chosen), len(last_access), 0
    for slot in kept:
        known = 0 <= slot < capacity
        if found < count and slot >= 0 and (not known or last_access[slot] < lap_start):
            chosen[found] = slot
            found += 1
    at = start
    while found < count and at < num_slots:
        slot = lap[at] if len(lap) else at
        if slot >= capacity or last_access[slot] < lap_start:
            chosen[found] = slot
            found += 1
        at += 1
    return at if found == count else LAP_ENDED


@part
def in_range(ids, stop):
    """Whether all ids are in 0 .. stop - 1."""
    inside = True
    for id in ids.flat:
        inside = inside and 0 <= id < stop
    return inside


@part
def write(rows, norms, values, width, last_ids, last_weights, fresh, ids, weights):
    """Erase the fresh rows, add every head's word at its last reads and its fresh row (eq. 5).

    The number of rows up to the highest one written.
    """
    heads, support = last_ids.shape
    stop = 0
    for slot in fresh:
        clear(rows[slot])
    for head in range(heads):
        gates = values[head, 2 * width :]
        gate, interpolation = sigmoid(gates[1]), sigmoid(gates[2])
        for entry in range(support):
            ids[head, entry] = last_ids[head, entry]
            weights[head, entry] = gate * (interpolation * last_weights[head, entry])
        ids[head, support] = fresh[head]
        weights[head, support] = gate * (1 - interpolation)
        for entry in range(support + 1):
            word = values[head, width : 2 * width]
            add_scaled(rows[ids[head, entry]], weights[head, entry], word)
            stop = max(stop, ids[head, entry] + 1)
    for id in ids.flat:
        norms[id] = inverse_norm(rows[id])
    return stop


@part
def rank(rows, norms, candidates, start, stop, query, scale, ids):
    """The best of rows start .. stop - 1, and of candidates before them, by cosine, best first.

    As `top_k` of sparsemem.indexes.ranking has it: ties by lower position. Candidates that are
    negative or not before `start` count as none.
    """
    k, found, cells = len(ids), np.int64(0), np.empty(len(ids))
    scaled, norm = np.zeros_like(query), inverse_norm(query)
    add_scaled(scaled, norm, query)
    for position in candidates:
        if 0 <= position < start:
            cell = cell_of(scale * (dot(rows[position], scaled) * norms[position]))
            found, _ = insert(cells, ids, found, cell, position)
    for position in range(start, stop):
        cell = cell_of(scale * (dot(rows[position], scaled) * norms[position]))
        if found < k or cell > cells[k - 1]:  # it comes behind its equals
            found, _ = insert(cells, ids, found, cell, position)


@part
def cell_of(score):
    """The place on the grid of a score in units of the grid; not-a-number comes first."""
    return np.inf if np.isnan(score) else np.rint(score)


@part
def read(table, values, width, ids, links, last_weights, rows, weights, reads):
    """What a step reads at ids [H, R]: rows [H, R, W], their weights, and what they sum to.

    With links [H, 2, K, S], R is 3K: entries linked before the last reads, entries read by
    content, entries linked after the last reads; see `SDNCCell`.
    """
    heads, entries = ids.shape
    k = entries // 3 if links.shape[2] else entries
    first = entries // 3 if links.shape[2] else 0  # of those read by content
    for head in range(heads):
        for entry in range(entries):
            assign(rows[head, entry], table[ids[head, entry]])
        query, strength = values[head, :width], values[head, 2 * width]
        content_weights(
            query, strength, rows[head, first : first + k], weights[head, first : first + k]
        )
        if links.shape[2]:
            mix(links[head], last_weights[head], values[head, 2 * width + GATES :], weights[head])
        clear(reads[head])
        for entry in range(entries):
            add_scaled(reads[head], weights[head, entry], rows[head, entry])


@part
def mix(links, last_weights, logits, weights):
    """pi1 b + pi2 c + pi3 f: of weights [3K] those by content are given."""
    k, modes = links.shape[1], logits.copy()
    softmax(modes)
    for entry in range(k):
        weights[entry] = modes[0] * dot(links[0, entry], last_weights)
        weights[k + entry] *= modes[1]
        weights[2 * k + entry] = modes[2] * dot(links[1, entry], last_weights)


@part
def total_at(ids, weights, id):
    """Total weight of an id."""
    total = weights.dtype.type(0)
    for entry in range(len(ids)):
        if ids[entry] == id:
            total += weights[entry]
    return total


@part
def mark(last_access, time, ids, weights, other_ids, other_weights):
    """Slots whose weights, written plus read, exceed delta for a head are accessed now.

    The number of rows up to the highest one read.
    """
    stop = 0
    for head in range(len(ids)):
        for entries in (ids[head], other_ids[head]):
            for id in entries:
                total = total_at(ids[head], weights[head], id)
                total += total_at(other_ids[head], other_weights[head], id)
                if total > ACCESS_THRESHOLD:
                    last_access[id] = max(last_access[id], time)
        for id in other_ids[head]:
            stop = max(stop, id + 1)
    return stop


@kernel
def write_step(like, sizes, addresses):
    """Choose the fresh rows and write. The extent after it; LAP_ENDED or OUT_OF_PLACE if nothing
    was changed.
    """
    batch, heads, width, inputs, support, capacity, num_slots, spare, kept_width = sizes
    whole = np.empty(0, np.int64)
    rows = array_at(addresses[0], like, (batch, capacity, width))
    norms = array_at(addresses[1], like, (batch, capacity))
    touched = array_at(addresses[2], whole, (batch,))
    last_access = array_at(addresses[3], whole, (batch, capacity))
    lap = array_at(addresses[4], whole, (batch, num_slots if addresses[4] else 0))
    lap_start = array_at(addresses[5], whole, (batch,))
    start = array_at(addresses[6], whole, (batch,))
    kept = array_at(addresses[7], whole, (batch, kept_width))
    values = array_at(addresses[8], like, (batch, heads, inputs))
    last_ids = array_at(addresses[9], whole, (batch, heads, support))
    last_weights = array_at(addresses[10], like, (batch, heads, support))
    fresh = array_at(addresses[11], whole, (batch, heads))
    next_start = array_at(addresses[12], whole, (batch,))
    next_touched = array_at(addresses[13], whole, (batch,))
    ids = array_at(addresses[14], whole, (batch, heads, support + 1))
    weights = array_at(addresses[15], like, (batch, heads, support + 1))
    limit = capacity if capacity == num_slots else capacity - spare
    for b in range(batch):
        laps = lap[b] if lap_start[b] else lap[b, :0]
        next_start[b] = choose_fresh(
            kept[b], laps, lap_start[b], start[b], last_access[b], num_slots, fresh[b]
        )
        if next_start[b] == LAP_ENDED:
            return LAP_ENDED
        if not in_range(fresh[b], limit) or not in_range(last_ids[b], limit):
            return OUT_OF_PLACE
    extent = 0
    for b in range(batch):
        stop = write(
            rows[b], norms[b], values[b], width, last_ids[b], last_weights[b], fresh[b], ids[b],
            weights[b],
        )  # fmt: skip
        next_touched[b] = max(touched[b], stop)
        extent = max(extent, next_touched[b])
    return extent


@kernel
def search_step(like, sizes, addresses):
    """The rows to read by content: ids [B, H, K] among the touched rows and K untouched ones.

    For elements begin .. end - 1.
    Of rows before `start` only candidates [B, H, C] are looked at.
    """
    batch, heads, width, inputs, k, capacity, num_slots, grid_bits, start, proposed, begin, end = (
        sizes
    )
    whole = np.empty(0, np.int64)
    rows = array_at(addresses[0], like, (batch, capacity, width))
    norms = array_at(addresses[1], like, (batch, capacity))
    touched = array_at(addresses[2], whole, (batch,))
    values = array_at(addresses[3], like, (batch, heads, inputs))
    ids = array_at(addresses[4], whole, (batch, heads, k))
    candidates = array_at(addresses[5], whole, (batch, heads, proposed))
    for b in range(begin, end):
        stop = min(touched[b] + k, num_slots)
        for head in range(heads):
            query, before = values[b, head, :width], candidates[b, head]
            rank(rows[b], norms[b], before, start, stop, query, 2.0**grid_bits, ids[b, head])


@kernel
def read_step(like, sizes, addresses):
    """Read at ids and mark what was accessed. The extent after it."""
    batch, heads, width, inputs, support, entries, linked, capacity, time = sizes
    whole = np.empty(0, np.int64)
    table = array_at(addresses[0], like, (batch, capacity, width))
    touched = array_at(addresses[1], whole, (batch,))
    last_access = array_at(addresses[2], whole, (batch, capacity))
    values = array_at(addresses[3], like, (batch, heads, inputs))
    last_weights = array_at(addresses[4], like, (batch, heads, support))
    write_ids = array_at(addresses[5], whole, (batch, heads, support + 1))
    write_weights = array_at(addresses[6], like, (batch, heads, support + 1))
    ids = array_at(addresses[7], whole, (batch, heads, entries))
    links = array_at(addresses[8], like, (batch, heads, 2, linked, support))
    rows = array_at(addresses[9], like, (batch, heads, entries, width))
    weights = array_at(addresses[10], like, (batch, heads, entries))
    reads = array_at(addresses[11], like, (batch, heads, width))
    extent = 0
    for b in range(batch):
        read(
            table[b], values[b], width, ids[b], links[b], last_weights[b], rows[b], weights[b],
            reads[b],
        )  # fmt: skip
        stop = mark(last_access[b], time, write_ids[b], write_weights[b], ids[b], weights[b])
        touched[b] = max(touched[b], stop)
        extent = max(extent, touched[b])
    return extent


ENTRIES = {write_step: (9, 16), search_step: (12, 6), read_step: (9, 12)}  # sizes and addresses
