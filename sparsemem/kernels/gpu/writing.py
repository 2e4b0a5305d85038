"""The write of a step: fresh rows are erased, every head adds its word (eq. 3 and 5).

A program has one element of the batch. Entries written to the same row are added up by the first
of them, the only one that reads and stores the row: so there is no order to depend on.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.kernels.gpu.equations import (
    inverse_norm,
    kernel,
    load_rows,
    load_vector,
    store_rows,
)
from sparsemem.kernels.gpu.ranking import (
    LOWEST,
    grade_of_age,
    in_order,
    keep_best,
    key_of,
    none_yet,
)


@kernel
def least_recent(last_access, stop, COUNT: tl.constexpr, SIZE: tl.constexpr, SCAN: tl.constexpr):
    """The COUNT least recently accessed of the positions before `stop`."""
    best = none_yet(COUNT, SIZE)
    for begin in range(0, stop, SCAN):
        at = begin + tl.arange(0, SCAN)
        inside = at < stop
        age = grade_of_age(tl.load(last_access + at, mask=inside, other=0))
        best = keep_best(best, tl.where(inside, key_of(age, at), LOWEST))
    return in_order(best, COUNT, SIZE)


@kernel
def store_entries(
    values, last_ids, last_weights, fresh, ids, weights, support,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
    SUPPORT: tl.constexpr,
):  # fmt: skip
    """alpha (gamma wR_{t-1} + (1 - gamma) I): last step's reads, then the fresh row (eq. 5).

    Ids, -1 behind them, and weights [H, S + 1].
    """
    head, entry = tl.arange(0, HEAD_SIZE), tl.arange(0, SUPPORT)
    gates = values + head * INPUTS + 2 * WIDTH
    gate = tl.sigmoid(tl.load(gates + 1, mask=head < HEADS, other=0))
    interpolation = tl.sigmoid(tl.load(gates + 2, mask=head < HEADS, other=0))
    is_last = (head < HEADS)[:, None] & (entry < support)[None, :]
    is_fresh = (head < HEADS)[:, None] & (entry == support)[None, :]
    at = head[:, None] * support + entry[None, :]
    id = tl.load(last_ids + at, mask=is_last, other=-1)
    weight = tl.load(last_weights + at, mask=is_last, other=0) * interpolation[:, None]
    id = tl.where(is_fresh, fresh[:, None], id)
    weight = tl.where(is_fresh, 1 - interpolation[:, None], weight) * gate[:, None]
    at = head[:, None] * (support + 1) + entry[None, :]
    tl.store(ids + at, id, mask=is_last | is_fresh)
    tl.store(weights + at, weight, mask=is_last | is_fresh)
    return id, weight


@kernel
def add_all_words(
    rows, norms, values, id, weight, support,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SUPPORT: tl.constexpr,
):  # fmt: skip
    """Change the rows of all entries [H, S + 1], each with what all of them add to its row."""
    SIZE: tl.constexpr = HEAD_SIZE * SUPPORT
    head, entry, at = tl.arange(0, HEAD_SIZE), tl.arange(0, SUPPORT), tl.arange(0, SIZE)
    row_id = tl.reshape(id, [SIZE])
    row = load_rows(rows, row_id, row_id >= 0, WIDTH, COLUMNS)
    same = (row_id[:, None, None] == id[None, :, :]).to(tl.int32)
    share = tl.sum(tl.where(same > 0, weight[None, :, :], 0), 2)
    is_at = tl.max(same, 2)  # 0 times not-a-number would be one elsewhere
    added = tl.zeros([SIZE, COLUMNS], rows.dtype.element_ty)
    for of in tl.static_range(HEADS):
        word = load_vector(values + of * INPUTS + WIDTH, WIDTH, COLUMNS)
        by_head = tl.sum(tl.where((head == of)[None, :], share, 0), 1)
        is_by_head = tl.max(tl.where((head == of)[None, :], is_at, 0), 1) > 0
        added += tl.where(is_by_head[:, None], by_head[:, None] * word[None, :], 0)
    erased = tl.max(tl.max(tl.where((entry == support)[None, None, :], same, 0), 2), 1)
    before = (head[:, None] * SUPPORT + entry[None, :])[None, :, :] < at[:, None, None]
    earlier = tl.max(tl.max(tl.where(before, same, 0), 2), 1)
    row = tl.where((erased > 0)[:, None], 0, row) + added
    is_first = (row_id >= 0) & (earlier == 0)
    tl.debug_barrier()  # several threads may have loaded what one stores
    store_rows(rows, row_id, is_first, row, WIDTH, COLUMNS)
    tl.store(norms + row_id, inverse_norm(row, 1), mask=is_first)


@kernel
def add_words(
    rows, norms, values, ids, weights, written, begin,
    HEADS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    SUPPORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Change the rows of entries begin .. begin + BLOCK - 1; each head has `written` entries."""
    entry, other = begin + tl.arange(0, BLOCK), tl.arange(0, SUPPORT)
    id = tl.load(ids + entry, mask=entry < HEADS * written, other=-1)
    added = tl.zeros([BLOCK, COLUMNS], rows.dtype.element_ty)
    erased, earlier = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for head in range(0, HEADS):
        first = head * written
        other_id = tl.load(ids + first + other, mask=other < written, other=-2)
        same = id[:, None] == other_id[None, :]
        weight = load_vector(weights + first, written, SUPPORT)
        share = tl.sum(tl.where(same, weight[None, :], 0), 1)
        word = load_vector(values + head * INPUTS + WIDTH, WIDTH, COLUMNS)
        is_at = tl.max(same.to(tl.int32), 1) > 0  # 0 times not-a-number would be one elsewhere
        added += tl.where(is_at[:, None], share[:, None] * word[None, :], 0)
        is_fresh = same & (other == written - 1)[None, :]
        erased = tl.maximum(erased, tl.max(is_fresh.to(tl.int32), 1))
        before = same & ((first + other)[None, :] < entry[:, None])
        earlier = tl.maximum(earlier, tl.max(before.to(tl.int32), 1))
    is_first = (id >= 0) & (earlier == 0)
    row = load_rows(rows, id, is_first & (erased == 0), WIDTH, COLUMNS) + added
    tl.debug_barrier()  # several threads may have loaded what one stores
    store_rows(rows, id, is_first, row, WIDTH, COLUMNS)
    tl.store(norms + id, inverse_norm(row, 1), mask=is_first)


@kernel(
    do_not_specialize=["support", "capacity"],
    do_not_specialize_on_alignment=[
        "touched", "touched_after", "values", "last_ids", "last_weights", "ids", "weights",
    ],
)  # fmt: skip
def write_kernel(
    rows, norms, last_access, touched, touched_after, values, last_ids, last_weights,
    ids, weights, support, capacity,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SUPPORT: tl.constexpr, SCAN: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the fresh rows and write; grid (B,).

    Memory: rows [B, C, W], norms [B, C], last_access [B, C], touched [B]; there is room for HEADS
    more, or for all. Values [B, H, I]. Last reads [B, H, S]. Made: `touched_after` [B], what is
    touched now; ids and weights [B, H, S + 1].
    """
    b = tl.program_id(0).to(tl.int64)
    rows += b * capacity * WIDTH
    norms += b * capacity
    values += b * HEADS * INPUTS
    written = support + 1
    ids += b * HEADS * written
    weights += b * HEADS * written
    before = tl.load(touched + b)
    stop = tl.minimum(before + HEADS, capacity).to(tl.int32)
    fresh = least_recent(last_access + b * capacity, stop, HEADS, HEAD_SIZE, SCAN)
    id, weight = store_entries(
        values, last_ids + b * HEADS * support, last_weights + b * HEADS * support, fresh, ids,
        weights, support, HEADS, HEAD_SIZE, INPUTS, WIDTH, SUPPORT,
    )  # fmt: skip
    tl.store(touched_after + b, tl.maximum(before, tl.max(tl.max(id, 1), 0) + 1))
    if WHOLE:
        add_all_words(
            rows, norms, values, id, weight, support, HEADS, HEAD_SIZE, INPUTS, WIDTH, COLUMNS,
            SUPPORT,
        )  # fmt: skip
    else:
        tl.debug_barrier()  # ids and weights are read by other threads than stored them
        for begin in range(0, HEADS * written, BLOCK):
            add_words(
                rows, norms, values, ids, weights, written, begin, HEADS, INPUTS, WIDTH, COLUMNS,
                SUPPORT, BLOCK,
            )  # fmt: skip
