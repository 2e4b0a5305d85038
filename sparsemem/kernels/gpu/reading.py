"""The read of a step: search by content, weights, what is read, and what was accessed.

A program has one head of one element of the batch; of a long search, a part of the rows.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.kernels.gpu.equations import (
    content_weights,
    inverse_norm,
    kernel,
    load_rows,
    load_table,
    load_vector,
    mode_weights,
    store_table,
)
from sparsemem.kernels.gpu.ranking import (
    LOWEST,
    grade_of_score,
    in_order,
    keep_best,
    key_of,
    none_yet,
)
from sparsemem.memory.usage import ACCESS_THRESHOLD

DELTA = tl.constexpr(ACCESS_THRESHOLD)


@kernel(
    do_not_specialize=["capacity"], do_not_specialize_on_alignment=["touched", "values"]
)  # fmt: skip
def search_kernel(
    rows, norms, touched, values, keys, capacity,
    HEADS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, NEIGHBOURS: tl.constexpr, SCAN: tl.constexpr, GRID: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """The best K by cosine of each of P parts of the touched rows and K untouched ones, as keys
    [B, H, P, K]; grid (B, H, P).
    """
    b, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    rows += b * capacity * WIDTH
    norms += b * capacity
    stop = tl.minimum(tl.load(touched + b) + K, capacity).to(tl.int32)
    size = (stop + tl.num_programs(2) - 1) // tl.num_programs(2)
    start = part * size
    stop = tl.minimum(start + size, stop)
    query = load_vector(values + (b * HEADS + head) * INPUTS, WIDTH, COLUMNS)
    query *= inverse_norm(query, 0)
    best = none_yet(K, NEIGHBOURS)
    for begin in range(start, stop, SCAN):
        at = begin + tl.arange(0, SCAN)
        inside = at < stop
        row = load_rows(rows, at.to(tl.int64), inside, WIDTH, COLUMNS)
        norm = tl.load(norms + at, mask=inside, other=0)
        grade = grade_of_score(tl.sum(row * query[None, :], 1) * norm, GRID, ROUNDING)
        best = keep_best(best, tl.where(inside, key_of(grade, at), LOWEST))
    best = tl.where(best < 0, LOWEST, best)  # there were fewer
    place = tl.arange(0, NEIGHBOURS)
    keys += ((b * HEADS + head) * tl.num_programs(2) + part) * K
    tl.store(keys + place, best, mask=place < K)


@kernel
def found(keys, count, K: tl.constexpr, NEIGHBOURS: tl.constexpr, SIZE: tl.constexpr):
    """Positions of the K best of `count` keys, best first."""
    best = none_yet(K, NEIGHBOURS)
    for begin in range(0, count, SIZE):
        at = begin + tl.arange(0, SIZE)
        best = keep_best(best, tl.load(keys + at, mask=at < count, other=LOWEST))
    return in_order(best, K, NEIGHBOURS)


@kernel
def read_rows(table, id, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
              NEIGHBOURS: tl.constexpr):  # fmt: skip
    """K rows of the table."""
    return load_rows(table, id, tl.arange(0, NEIGHBOURS) < K, WIDTH, COLUMNS)


@kernel
def weigh(
    id, weight, row, ids, weights, rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Store K entries and their rows; the sum of the rows times their weights."""
    entry = tl.arange(0, NEIGHBOURS)
    tl.store(ids + entry, id, mask=entry < K)
    tl.store(weights + entry, weight, mask=entry < K)
    store_table(rows, row, K, WIDTH, NEIGHBOURS, COLUMNS)
    return tl.sum(weight[:, None] * row, 0)


@kernel
def entries_at(at, ids, weights, count, other_ids, other_weights, total):
    """Entries of two lists, the second (total - count) behind the first; id -1 behind both."""
    is_first, is_other = at < count, (at >= count) & (at < total)
    id = tl.load(ids + at, mask=is_first, other=-1)
    weight = tl.load(weights + at, mask=is_first, other=0)
    other_id = tl.load(other_ids + (at - count), mask=is_other, other=-1)
    other_weight = tl.load(other_weights + (at - count), mask=is_other, other=0)
    return tl.where(is_first, id, other_id), tl.where(is_first, weight, other_weight)


@kernel
def mark(last_access, time, ids, weights, count, other_ids, other_weights, total,
         SIZE: tl.constexpr):  # fmt: skip
    """Slots whose weights, written plus read, exceed delta are accessed now. The highest slot."""
    highest = tl.full([], -1, tl.int64)
    for begin in range(0, total, SIZE):
        at = begin + tl.arange(0, SIZE)
        id, _ = entries_at(at, ids, weights, count, other_ids, other_weights, total)
        sums = tl.zeros([SIZE], weights.dtype.element_ty)
        for first in range(0, total, SIZE):
            beside = first + tl.arange(0, SIZE)
            other, weight = entries_at(beside, ids, weights, count, other_ids, other_weights, total)
            same = id[:, None] == other[None, :]
            sums += tl.sum(tl.where(same, weight[None, :], 0), 1)
        tl.store(last_access + id, tl.zeros_like(id) + time, mask=(id >= 0) & (sums > DELTA))
        highest = tl.maximum(highest, tl.max(id, 0))
    return highest


@kernel(
    do_not_specialize=["support", "parts", "capacity", "time", "stride"],
    do_not_specialize_on_alignment=[
        "touched", "values", "last_weights", "write_ids", "write_weights", "ids", "rows", "weights",
        "reads",
    ],
)  # fmt: skip
def read_kernel(
    table, last_access, touched, values, last_weights, write_ids, write_weights, keys, linked,
    links, ids, rows, weights, reads, support, parts, capacity, time, stride,
    HEADS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, NEIGHBOURS: tl.constexpr, SUPPORT: tl.constexpr, LINKED: tl.constexpr,
    KEYS: tl.constexpr, MARKS: tl.constexpr,
):  # fmt: skip
    """Read, and end the step; grid (B, H).

    Memory: table [B, C, W], last_access [B, C], touched [B]. Values [B, H, I]. Last read weights
    [B, H, S]. Written: ids and weights [B, H, S + 1]. Found: keys [B, H, P, K]. LINKED: ids
    [B, H, 2, K] and weights [B, H, 2, K, S] of rows linked before and after the last reads. Made:
    ids and weights [B, H, R], rows [B, H, R, W], reads [B, H * W] in rows of `stride`.
    """
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = b * HEADS + head
    table += b * capacity * WIDTH
    last_access += b * capacity
    values += at * INPUTS
    R: tl.constexpr = 3 * K if LINKED else K
    FIRST: tl.constexpr = K if LINKED else 0
    ids += at * R
    weights += at * R
    rows += at * R * WIDTH
    id = found(keys + at * parts * K, parts * K, K, NEIGHBOURS, KEYS)
    row = read_rows(table, id, WIDTH, COLUMNS, K, NEIGHBOURS)
    query = load_vector(values, WIDTH, COLUMNS)
    weight = content_weights(query, tl.load(values + 2 * WIDTH), row, K, NEIGHBOURS)
    if LINKED:
        before, content, after = mode_weights(values + 2 * WIDTH + 3)
        weight *= content
    read = weigh(
        id, weight, row, ids + FIRST, weights + FIRST, rows + FIRST * WIDTH, WIDTH, COLUMNS, K,
        NEIGHBOURS,
    )  # fmt: skip
    if LINKED:
        last = load_vector(last_weights + at * support, support, SUPPORT)
        for way in tl.static_range(2):
            id = load_vector(linked + (at * 2 + way) * K, K, NEIGHBOURS)
            row = read_rows(table, id, WIDTH, COLUMNS, K, NEIGHBOURS)
            of = links + (at * 2 + way) * K * support
            link = load_table(of, K, support, NEIGHBOURS, SUPPORT)
            mode = before if way == 0 else after
            weight = tl.sum(link * last[None, :], 1) * mode
            read += weigh(
                id, weight, row, ids + way * 2 * K, weights + way * 2 * K,
                rows + way * 2 * K * WIDTH, WIDTH, COLUMNS, K, NEIGHBOURS,
            )  # fmt: skip
    column = tl.arange(0, COLUMNS)
    tl.store(reads + b * stride + head * WIDTH + column, read, mask=column < WIDTH)
    tl.debug_barrier()  # ids and weights are read by other threads than stored them
    written = support + 1
    highest = mark(
        last_access, time, write_ids + at * written, write_weights + at * written, written, ids,
        weights, written + R, MARKS,
    )  # fmt: skip
    tl.atomic_max(touched + b, highest + 1, sem="relaxed")
