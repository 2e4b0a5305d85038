"""Temporal links: `TemporalLinks.update` and `follow` of sparsemem.memory.links, in three kernels.

But for the decay of P few rows change: in N those written, in P those of the precedence. They are
mixed first. Then all rows are gone through: P decays, and both tables are multiplied with the last
reads. At last the best rows are taken from what the parts of the scan found. Positions are slots. A
program has one head of one element of the batch, and some of the rows.

L links are kept of a row, and LINKS is their padded length. Entries of two lists are joined in
arrays of SIZE, in which every entry is compared with every other: a row is short.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.kernels.gpu.equations import kernel, load_vector, store_table
from sparsemem.kernels.gpu.ranking import (
    LOWEST,
    grade_of_score,
    keep_best,
    key_of,
    none_yet,
)
from sparsemem.kernels.gpu.reading import found


@kernel
def key_of_weight(weight, id, GRID: tl.constexpr, ROUNDING: tl.constexpr):
    """By weight, then the lower id; no zero comes before a weight, however small."""
    return key_of(grade_of_score(tl.where(weight == 0, -1.0, weight), GRID, ROUNDING), id)


@kernel
def joined(
    ids, weights, row, inside, other_ids, other_weights, others, L: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Rows of a table and, behind each, `others` entries of a vector: ids [R, E], -1 where there is
    none; the rows' weights [R, E] and the vector's [E], zero where the other one's are.
    """
    entry = tl.arange(0, SIZE)
    is_other = (entry >= L) & (entry < others + L)
    at = row[:, None] * L + entry[None, :]
    is_link = inside[:, None] & (entry < L)[None, :]
    id = tl.load(ids + at, mask=is_link, other=-1)
    weight = tl.load(weights + at, mask=is_link, other=0)
    other_id = tl.load(other_ids + (entry - L), mask=is_other, other=-1)
    other = tl.load(other_weights + (entry - L), mask=is_other, other=0)
    return tl.where(is_other[None, :], other_id[None, :], id), weight, other


@kernel
def summed(id, weight):
    """What all of the entries [R, E] with an entry's id weigh together."""
    same = id[:, :, None] == id[:, None, :]
    return tl.sum(tl.where(same, weight[:, None, :], 0), 2)


@kernel
def put_largest(
    ids, weights, row, inside, id, weight,
    L: tl.constexpr, SIZE: tl.constexpr, GRID: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Replace rows by the L largest of [R, E] entries, repeated ids added up; ties by lower id."""
    entry = tl.arange(0, SIZE)
    earlier = (entry[None, :] < entry[:, None])[None, :, :]
    repeated = (id[:, :, None] == id[:, None, :]) & earlier
    total = tl.where(tl.max(repeated.to(tl.int32), 2) > 0, 0, summed(id, weight))
    key = tl.where(id >= 0, key_of_weight(total, id, GRID, ROUNDING), LOWEST)
    own, other = key[:, :, None], key[:, None, :]
    rank = tl.sum(((other > own) | ((other == own) & earlier)).to(tl.int32), 2)
    kept = inside[:, None] & (id >= 0) & (rank < L)
    at = row[:, None] * L + rank
    tl.debug_barrier()  # several threads may have loaded what one stores
    tl.store(ids + at, id, mask=kept)
    tl.store(weights + at, total, mask=kept)


@kernel
def rows_of(ids, weights, count, begin, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Of entries begin .. begin + BLOCK - 1: ids, what each id weighs, and which are its first."""
    entry, other = begin + tl.arange(0, BLOCK), tl.arange(0, SIZE)
    id = tl.load(ids + entry, mask=entry < count, other=-1)
    other_id = tl.load(ids + other, mask=other < count, other=-2)
    same = id[:, None] == other_id[None, :]
    total = tl.sum(tl.where(same, load_vector(weights, count, SIZE)[None, :], 0), 1)
    repeated = tl.max((same & (other[None, :] < entry[:, None])).to(tl.int32), 1)
    return id, total, (id >= 0) & (repeated == 0)


@kernel
def mix_rows(
    ids, weights, row_ids, row_weights, rows, other_ids, other_weights, others, begin,
    DECAY: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, GRID: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """The rows of a table that are entries begin .. begin + BLOCK - 1 of one vector take in another
    one, times their weight.

    They lose as much of themselves; with DECAY, each of their links what the other one has there.
    """
    row, factor, is_first = rows_of(row_ids, row_weights, rows, begin, BLOCK, ROWS)
    id, weight, other = joined(
        ids, weights, row, is_first, other_ids, other_weights, others, L, SIZE
    )  # fmt: skip
    lost = factor[:, None]
    if DECAY:
        lost = summed(id, tl.broadcast_to(other[None, :], [BLOCK, SIZE]))
    weight = (-lost + 1) * weight + factor[:, None] * other[None, :]
    put_largest(ids, weights, row, is_first, id, weight, L, SIZE, GRID, ROUNDING)


@kernel(
    do_not_specialize=["support", "capacity"],
    do_not_specialize_on_alignment=["write_ids", "write_weights"],
)  # fmt: skip
def mix_kernel(
    follows_ids, follows, precedes_ids, precedes, before_ids, before, write_ids, write_weights,
    after_ids, after, support, capacity,
    L: tl.constexpr, LINKS: tl.constexpr, SUPPORT: tl.constexpr, FEW: tl.constexpr,
    FEW_BLOCK: tl.constexpr, MANY: tl.constexpr, MANY_BLOCK: tl.constexpr, GRID: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """Link what was written behind what was before, in the rows concerned.

    Tables [B, H, C, L]; precedence before [B, H, L]; written [B, H, S + 1]. Made: the precedence
    after, [B, H, L]. FEW: room for two rows of links; MANY: for links and what was written. Grid
    (B * H, blocks of rows of N, then of P, and 1 for the precedence).
    """
    at, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    written, table = support + 1, at * capacity * L
    before_ids += at * L
    before += at * L
    write_ids += at * written
    write_weights += at * written
    N_BLOCKS: tl.constexpr = SUPPORT // FEW_BLOCK
    P_BLOCKS: tl.constexpr = LINKS // MANY_BLOCK
    if block < N_BLOCKS:
        mix_rows(
            follows_ids + table, follows + table, write_ids, write_weights, written, before_ids,
            before, L, block * FEW_BLOCK, False, L, SUPPORT, FEW, FEW_BLOCK, GRID, ROUNDING,
        )  # fmt: skip
    elif block < N_BLOCKS + P_BLOCKS:
        mix_rows(
            precedes_ids + table, precedes + table, before_ids, before, L, write_ids,
            write_weights, written, (block - N_BLOCKS) * MANY_BLOCK, True, L, LINKS, MANY,
            MANY_BLOCK, GRID, ROUNDING,
        )  # fmt: skip
    else:
        row = tl.zeros([1], tl.int64)
        id, weight, other = joined(
            before_ids, before, row, row == 0, write_ids, write_weights, written, L, MANY
        )
        weight = (-tl.sum(other, 0) + 1) * weight + other[None, :]
        put_largest(
            after_ids + at * L, after + at * L, row, row == 0, id, weight, L, MANY, GRID, ROUNDING
        )


@kernel
def weights_at(id, ids, weights, count, ROWS: tl.constexpr, LINKS: tl.constexpr):
    """What a vector of `count` entries weighs at ids [ROWS, LINKS]."""
    total = tl.zeros([ROWS, LINKS], weights.dtype.element_ty)
    for entry in range(0, count):
        same = id == tl.load(ids + entry).to(tl.int32)
        total += tl.where(same, tl.load(weights + entry), 0)
    return total


@kernel
def is_among(at, ids, COUNT: tl.constexpr):
    """Which of the positions are among COUNT ids."""
    same = at < 0
    for entry in range(0, COUNT):
        same = same | (at == tl.load(ids + entry).to(tl.int32))
    return same


@kernel(
    do_not_specialize=["support", "capacity"],
    do_not_specialize_on_alignment=[
        "touched", "write_ids", "write_weights", "last_ids", "last_weights", "keys",
    ],
)  # fmt: skip
def scan_kernel(
    follows_ids, follows, precedes_ids, precedes, before_ids, touched, write_ids, write_weights,
    last_ids, last_weights, keys, support, capacity,
    HEADS: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr, L: tl.constexpr,
    LINKS: tl.constexpr, ROWS: tl.constexpr, GRID: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """P loses at what was written, but in the rows that were mixed; then the K largest of P times
    the last reads, and of N, in each part of the rows. Grid (B * H, parts, 2).

    Tables [B, H, C, L]; precedence before [B, H, L]; touched [B]; written [B, H, S + 1]; last reads
    [B, H, S]. Made: keys [B, H, 2, parts, K].
    """
    at, part, way = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    parts, table = tl.num_programs(1), at * capacity * L
    ids, weights = precedes_ids + table, precedes + table
    if way == 1:
        ids, weights = follows_ids + table, follows + table
    before_ids += at * L
    write_ids += at * (support + 1)
    write_weights += at * (support + 1)
    last_ids += at * support
    last_weights += at * support
    stop = tl.minimum(tl.maximum(tl.load(touched + at // HEADS), K), capacity).to(tl.int32)
    size = (stop + parts - 1) // parts
    start = part * size
    stop = tl.minimum(start + size, stop)
    best = none_yet(K, NEIGHBOURS)
    link = tl.arange(0, LINKS)
    for begin in range(start, stop, ROWS):
        row = begin + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * L + link[None, :]
        inside = (row < stop)[:, None] & (link < L)[None, :]
        id = tl.load(ids + place, mask=inside, other=-1).to(tl.int32)
        weight = tl.load(weights + place, mask=inside, other=0)
        if way == 0:
            lost = weights_at(id, write_ids, write_weights, support + 1, ROWS, LINKS)
            loses = inside & (lost != 0) & (is_among(row, before_ids, L) == 0)[:, None]
            weight = tl.where(loses, (-lost + 1) * weight, weight)
            tl.debug_barrier()  # several threads may have loaded what one stores
            tl.store(weights + place, weight, mask=loses)
        read = weights_at(id, last_ids, last_weights, support, ROWS, LINKS)
        key = key_of_weight(tl.sum(weight * read, 1), row, GRID, ROUNDING)
        best = keep_best(best, tl.where(row < stop, key, LOWEST))
    best = tl.where(best < 0, LOWEST, best)  # there were fewer
    neighbour = tl.arange(0, NEIGHBOURS)
    keys += ((at * 2 + way) * parts + part) * K
    tl.store(keys + neighbour, best, mask=neighbour < K)


@kernel(
    do_not_specialize=["support", "parts", "capacity"],
    do_not_specialize_on_alignment=[
        "last_ids", "last_weights", "keys", "linked", "links",
    ],
)  # fmt: skip
def follow_kernel(
    follows_ids, follows, precedes_ids, precedes, last_ids, last_weights, keys, linked, links,
    support, parts, capacity,
    K: tl.constexpr, NEIGHBOURS: tl.constexpr, L: tl.constexpr, SUPPORT: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The K best rows of each table, and how they depend on the last reads; grid (B * H, 2).

    Tables [B, H, C, L]; last reads [B, H, S]; keys [B, H, 2, parts, K]. Made: ids [B, H, 2, K] and
    weights [B, H, 2, K, S].
    """
    at, way = tl.program_id(0).to(tl.int64), tl.program_id(1)
    table = at * capacity * L
    ids, weights = precedes_ids + table, precedes + table
    if way == 1:
        ids, weights = follows_ids + table, follows + table
    last_id = tl.load(
        last_ids + at * support + tl.arange(0, SUPPORT),
        mask=tl.arange(0, SUPPORT) < support, other=-2,
    )  # fmt: skip
    last = load_vector(last_weights + at * support, support, SUPPORT)
    at = at * 2 + way
    row = found(keys + at * parts * K, parts * K, K, NEIGHBOURS, KEYS)
    neighbour = tl.arange(0, NEIGHBOURS)
    inside = neighbour < K
    tl.store(linked + at * K + neighbour, row, mask=inside)
    of = tl.zeros([NEIGHBOURS, SUPPORT], weights.dtype.element_ty)
    for link in range(0, L):
        id = tl.load(ids + row * L + link, mask=inside, other=-1)
        weight = tl.load(weights + row * L + link, mask=inside, other=0)
        of += tl.where(id[:, None] == last_id[None, :], weight[:, None], 0)
    of = tl.where((tl.sum(of * last[None, :], 1) > 0)[:, None], of, 0)
    store_table(links + at * K * support, of, K, support, NEIGHBOURS, SUPPORT)
