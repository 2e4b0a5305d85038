"""The kernels of the exact search on a GPU: scan tiles of rows; find rows in the best of them.

`device_scan` launches these kernels and says what they are for.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.indexes.key_kernels import (
    EPSILON,
    MOST,
    NOTHING,
    ROWS_FROM,
    WORST,
    kernel,
    keys_of,
    numbers_of,
    scale_and_length,
    scale_for,
    with_better,
    worth_of,
    worths_of_rows,
)


@kernel
def halves(values):
    """A float32's 11 leading bits, which are all that a tf32 product takes of it, and the rest."""
    leading = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return leading, values - leading


@kernel
def product(rows, wide, queries, PRODUCT: tl.constexpr, TURNED: tl.constexpr):
    """rows [ROWS, w] . queries [w, Q], summed in float32: `device_scan` has the errors.

    Rough ones take the 11 leading bits of both, or round queries to 16 bits where rows have no
    more (`wide` is rows in float32). Fine ones split float32 rows in two, as their queries; queries
    of other rows in two or three. Turned, rows are taken as they lie in shared memory, and maxima
    over rows are those over what a thread holds: cheaper for many queries.
    """
    if PRODUCT == "float32":
        high, low = halves(wide)
        query_high, query_low = halves(queries)
        sums = tl.dot(high, query_low, input_precision="tf32")
        sums = tl.dot(low, query_high, sums, input_precision="tf32")
        sums = tl.dot(high, query_high, sums, input_precision="tf32")
    elif PRODUCT == "rough float32" or PRODUCT == "rough centered":
        if TURNED:
            sums = tl.dot(tl.trans(queries), tl.trans(wide), input_precision="tf32")
            sums = tl.trans(sums)
        else:
            sums = tl.dot(wide, queries, input_precision="tf32")
    else:
        if TURNED:
            queries = tl.trans(queries)
        first = queries.to(rows.dtype)
        rest = queries - first.to(tl.float32)
        second = rest.to(rows.dtype)
        third = (rest - second.to(tl.float32)).to(rows.dtype)
        if TURNED:
            turned = tl.trans(rows)
            sums = tl.dot(first, turned)
            if PRODUCT != "rough":
                sums = tl.dot(second, turned, sums)
            if PRODUCT == "bfloat16":
                sums = tl.dot(third, turned, sums)
            sums = tl.trans(sums)
        else:
            sums = tl.dot(rows, first)
            if PRODUCT != "rough":
                sums = tl.dot(rows, second, sums)
            if PRODUCT == "bfloat16":
                sums = tl.dot(rows, third, sums)
    return sums


@kernel
def queries_at(queries, center, start, count, WIDTH: tl.constexpr, PART: tl.constexpr,
               QUERIES: tl.constexpr, CENTERED: tl.constexpr):  # fmt: skip
    """Columns start.. of the queries less the center, as [PART, QUERIES]; zero beyond."""
    w = start + tl.arange(0, PART)
    q = tl.arange(0, QUERIES)
    inside = (w < WIDTH)[:, None] & (q < count)[None, :]
    values = tl.load(queries + q[None, :] * WIDTH + w[:, None], mask=inside, other=0.0)
    if CENTERED:
        middle = tl.load(center + w, mask=w < WIDTH, other=0.0)
        values = tl.where(inside, values - middle[:, None], 0.0)
    return values


@kernel
def float32_rows(part, center, start, WIDTH: tl.constexpr, PART: tl.constexpr,
                 CENTERED: tl.constexpr):  # fmt: skip
    """Columns start.. of rows in float32, less the center."""
    wide = part.to(tl.float32)
    if CENTERED:
        w = start + tl.arange(0, PART)
        wide = wide - tl.load(center + w, mask=w < WIDTH, other=0.0)[None, :]
    return wide


@kernel
def best_worth(sums, squares, there, inverse, errors, METRIC: tl.constexpr, ERROR: tl.constexpr):
    """The best worth of a tile's rows for each query, from products and squares of rows."""
    # What is not live becomes not a number, which maxima pass over.
    if METRIC == "l2":
        lessened = tl.where(there, squares * (1.0 - 2.0 * ERROR), float("nan"))
        sums = sums - lessened[:, None] * (0.5 * inverse)[None, :]
    elif METRIC == "cosine":
        sums = sums * tl.where(there, tl.rsqrt(squares + EPSILON), float("nan"))[:, None]
    else:
        sums = sums + tl.where(there, tl.sqrt(squares), float("nan"))[:, None] * errors[None, :]
    none = tl.where(tl.max(there.to(tl.int32), 0) > 0, WORST, float("-inf"))
    worth = tl.max(sums, 0)
    return tl.where(worth > WORST, worth, none)  # none, too, if there are no numbers


@kernel
def best_of_own(best, pid, tiles, programs, QUERIES: tl.constexpr, AHEAD: tl.constexpr):
    """The best key of the tiles that a program has scanned, for each query."""
    head = tl.full([QUERIES], NOTHING, tl.int64)
    for several in range(pid, tiles, programs * AHEAD):
        own = several + tl.arange(0, AHEAD) * programs
        offsets = own.to(tl.int64)[:, None] * QUERIES + tl.arange(0, QUERIES)[None, :]
        again = tl.load(best + offsets, mask=(own < tiles)[:, None], other=float("-inf"))
        head = tl.maximum(head, tl.max(keys_of(again, own[:, None]), 0))
    return head


@kernel(do_not_specialize=["count", "extent", "tiles", "programs"])
def scan_tiles(
    rows, live, queries, center, unsure, best, heads, count, extent, tiles, programs,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    METRIC: tl.constexpr, PRODUCT: tl.constexpr, TURNED: tl.constexpr, ERROR: tl.constexpr,
):  # fmt: skip
    """Bounds of the worths in each tile, best [tiles, QUERIES]; each program's best, heads [Q, P].

    Program p scans the tiles p, p + P, p + 2 P, ... Worths are in units of a power of two for each
    query, for l2 halved and less a constant; they lack the slack that `may_matter` adds, the
    same for all rows. Nothing is done where no query is unsure.
    """
    CENTERED: tl.constexpr = METRIC == "l2"
    pid = tl.program_id(0)
    r = tl.arange(0, ROWS)
    w = tl.arange(0, PART)
    q = tl.arange(0, QUERIES)
    if tl.max(tl.load(unsure + q, mask=q < count, other=0), 0) == 0:
        return
    largest = tl.zeros([QUERIES], tl.float32)
    for begin in tl.static_range(0, PARTS * PART, PART):
        values = queries_at(queries, center, begin, count, WIDTH, PART, QUERIES, CENTERED)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 0))
    inverse = scale_for(largest)
    lengths = tl.zeros([QUERIES], tl.float32)
    if METRIC == "ip":
        for begin in tl.static_range(0, PARTS * PART, PART):
            values = queries_at(queries, center, begin, count, WIDTH, PART, QUERIES, CENTERED)
            values = values * inverse[None, :]
            lengths += tl.sum(values * values, 0)
    errors = ERROR * tl.maximum(tl.sqrt(lengths), 1.0)  # for rows of length 1, of ip
    only = queries_at(queries, center, 0, count, WIDTH, PART, QUERIES, CENTERED) * inverse[None, :]
    marks = tl.load(live + pid * ROWS + r, mask=pid * ROWS + r < extent, other=0)
    for tile in tl.range(pid, tiles, programs, num_stages=STAGES):
        row = tile * ROWS + r
        inside = row < extent
        there = marks != 0
        after = row + programs * ROWS  # marks come from memory a tile ahead
        marks = tl.load(live + after, mask=after < extent, other=0)
        places = rows + row.to(tl.int64)[:, None] * STRIDE + w[None, :]
        if PARTS == 1:
            part = tl.load(places, mask=inside[:, None] & (w < WIDTH)[None, :], other=0.0)
            wide = float32_rows(part, center, 0, WIDTH, PART, CENTERED)
            squares = tl.sum(wide * wide, 1)
            sums = product(part, wide, only, PRODUCT, TURNED)
        else:
            squares = tl.zeros([ROWS], tl.float32)
            sums = tl.zeros([ROWS, QUERIES], tl.float32)
            for start in tl.range(0, PARTS * PART, PART):
                present = inside[:, None] & (start + w < WIDTH)[None, :]
                part = tl.load(places + start, mask=present, other=0.0)
                wide = float32_rows(part, center, start, WIDTH, PART, CENTERED)
                squares += tl.sum(wide * wide, 1)
                some = queries_at(queries, center, start, count, WIDTH, PART, QUERIES, CENTERED)
                sums += product(part, wide, some * inverse[None, :], PRODUCT, TURNED)
        worth = best_worth(sums, squares, there, inverse, errors, METRIC, ERROR)
        tl.store(best + tl.full([QUERIES], QUERIES, tl.int64) * tile + q, worth)
    tl.debug_barrier()  # what other threads of the program have stored is read below
    tl.store(heads + q * programs + pid, best_of_own(best, pid, tiles, programs, QUERIES, AHEAD))


@kernel
def keys_in_tiles(
    rows, live, query, length, tiles, extent,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, SEVERAL: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """The key of each row of SEVERAL tiles; a tile of -1 has none."""
    row = tl.reshape(tiles[:, None] * ROWS + tl.arange(0, ROWS)[None, :], [SEVERAL * ROWS])
    inside = (row >= 0) & (row < extent)
    there = tl.load(live + row, mask=inside, other=0) != 0
    worth = worths_of_rows(
        rows, row, inside, query, length, STRIDE, WIDTH, PART, PARTS, SEVERAL * ROWS, METRIC
    )
    return keys_of(tl.where(there, worth, float("-inf")), row)


@kernel
def next_in_lists(
    best, query, keys, tiles, programs, members, QUERIES: tl.constexpr, MEMBERS: tl.constexpr
):
    """Of each list, which is what a program has scanned, the greatest key below one of its keys."""
    following = tl.full(keys.shape, NOTHING, tl.int64)
    source = numbers_of(keys) % programs
    for start in range(0, members, MEMBERS):
        number = source[:, None] + ((start + tl.arange(0, MEMBERS)) * programs)[None, :]
        inside = (number >= 0) & (number < tiles)
        worth = tl.load(best + number * QUERIES + query, mask=inside, other=float("-inf"))
        others = keys_of(worth, number)
        below = tl.where(others < keys[:, None], others, NOTHING)
        following = tl.maximum(following, tl.max(below, 1))
    return tl.where(keys == NOTHING, NOTHING, following)


@kernel
def may_matter(key, least, inverse, length, METRIC: tl.constexpr, ERROR: tl.constexpr):
    """Whether a row of the tile of a key may be better than the k-th best row so far, as int32."""
    worth = worth_of(least)
    if METRIC == "l2":
        worth = 0.5 * inverse * (length + worth)
        slack = ERROR * inverse * length
    elif METRIC == "cosine":
        worth = inverse * tl.sqrt(length + EPSILON) * worth
        slack = ERROR * tl.maximum(inverse * tl.sqrt(length), 1.0)
    else:
        worth = inverse * worth
        slack = 0.0
    better = (worth_of(key) + slack >= worth) | (least < ROWS_FROM)
    return ((key != NOTHING) & better).to(tl.int32)


@kernel
def taken_from(front, least, inverse, length, SEVERAL: tl.constexpr, METRIC: tl.constexpr,
               ERROR: tl.constexpr):  # fmt: skip
    """The greatest keys that may matter, NOTHING behind them; and the front without them."""
    place = tl.arange(0, SEVERAL)
    keys = tl.full([SEVERAL], NOTHING, tl.int64)
    for number in tl.static_range(SEVERAL):
        key = tl.max(front, 0)
        key = tl.where(may_matter(key, least, inverse, length, METRIC, ERROR) != 0, key, NOTHING)
        keys = tl.where(place == number, key, keys)
        front = tl.where(front == key, NOTHING, front)
    return keys, front


@kernel(do_not_specialize=["extent", "tiles", "programs", "members", "k", "most"])
def find_rows(
    rows, live, queries, center, unsure, best, heads, scores, ids,
    extent, tiles, programs, members, k, most,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, LISTS: tl.constexpr, MEMBERS: tl.constexpr,
    KEPT: tl.constexpr, SEVERAL: tl.constexpr, METRIC: tl.constexpr, SIGN: tl.constexpr,
    ERROR: tl.constexpr,
):  # fmt: skip
    """Score tiles from the best on until no other may matter, at most `most`; keep k rows.

    For queries that are unsure; those for which more tiles might matter are so afterwards. SEVERAL
    tiles at a time, the best of different lists: what they wait for comes from memory together.
    """
    query = tl.program_id(0)
    if tl.load(unsure + query) == 0:
        return
    g = tl.arange(0, LISTS)
    slot = tl.arange(0, KEPT)
    own = queries + query * WIDTH
    inverse, length = scale_and_length(own, center, WIDTH, PART, PARTS, METRIC == "l2")
    front = tl.load(heads + query * programs + g, mask=g < programs, other=NOTHING)
    # Places that are empty hold keys that differ, so that a row takes one place.
    kept = tl.where(slot < k, NOTHING + slot.to(tl.int64), MOST)
    least = tl.min(kept, 0)
    seen = most * 0
    going = may_matter(tl.max(front, 0), least, inverse, length, METRIC, ERROR)
    while (going != 0) & (seen < most):
        keys, front = taken_from(front, least, inverse, length, SEVERAL, METRIC, ERROR)
        numbers = numbers_of(keys)
        # What is on its way from memory first, and then is needed last.
        following = next_in_lists(best, query, keys, tiles, programs, members, QUERIES, MEMBERS)
        found = keys_in_tiles(
            rows, live, own, length, numbers, extent,
            STRIDE, WIDTH, PART, PARTS, ROWS, SEVERAL, METRIC,
        )  # fmt: skip
        kept, least = with_better(kept, least, found)
        from_list = g[:, None] == (numbers % programs)[None, :]
        front = tl.maximum(front, tl.max(tl.where(from_list, following[None, :], NOTHING), 1))
        seen += SEVERAL
        going = may_matter(tl.max(front, 0), least, inverse, length, METRIC, ERROR)
    kept = tl.where((slot < k) & (kept > ROWS_FROM), kept, NOTHING)
    for place in range(k):
        key = tl.max(kept, 0)
        tl.store(ids + query * k + place, numbers_of(key))
        tl.store(scores + query * k + place, worth_of(key) * SIGN)
        kept = tl.where(kept == key, NOTHING, kept)
    tl.store(unsure + query, going)
