"""The kernels of a derived index on a GPU: they rank what it proposes and what is buffered.

`device_ranking` launches these kernels and says what they are for; keys as in `key_kernels`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.indexes.key_kernels import (
    EPSILON,
    MOST,
    NOTHING,
    ROWS_FROM,
    kernel,
    keys_of,
    numbers_of,
    scale_and_length,
    with_better,
    worth_of,
    worths_of_rows,
)


@kernel
def comparable_queries(queries, made, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
                       SCALED: tl.constexpr):  # fmt: skip
    """`kinds.comparable` of a query, in float32."""
    w = tl.arange(0, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * WIDTH + w
    query = tl.load(queries + place, mask=w < WIDTH, other=0.0)
    if SCALED:
        query = query * tl.rsqrt(tl.sum(query * query, 0) + EPSILON)
    query = tl.where(tl.abs(query) < float("inf"), query, 0.0)  # false for what is not a number
    tl.store(made + place, query, mask=w < WIDTH)


@kernel
def proposed_rows(labels, number, wanted, row_of, label_of, place, live):
    """The rows of some labels, and which of these are valid: their rows' latest, not buffered."""
    label = tl.load(labels + number, mask=number < wanted, other=-1)
    there = label >= 0
    row = tl.load(row_of + label, mask=there, other=0)
    latest = tl.load(label_of + row, mask=there, other=0) == label + 1
    buffered = tl.load(place + row, mask=there, other=1) > 0
    is_live = tl.load(live + row, mask=there, other=0) != 0
    return row, there & latest & is_live & (buffered == 0)


@kernel
def buffered_rows(beside, number, besides, entries):
    """The rows of some places in the buffer, and where there are any."""
    entry = tl.load(beside + number, mask=(number >= 0) & (number < besides), other=-1)
    there = entry >= 0
    return tl.load(entries + entry, mask=there, other=0), there


@kernel
def stored(scores, ids, keys, k, least, KEPT: tl.constexpr, SIGN: tl.constexpr):
    """Write what k keys hold, the greatest first; the key that is `least`-th of them."""
    last = tl.max(tl.full([KEPT], NOTHING, tl.int64), 0)
    for place in range(k):
        key = tl.max(keys, 0)
        tl.store(ids + place, numbers_of(key))
        tl.store(scores + place, worth_of(key) * SIGN)
        last = tl.where(place == least - 1, key, last)
        keys = tl.where(keys == key, NOTHING, keys)
    return last


@kernel(do_not_specialize=["wanted", "besides", "k", "least"])
def rank_proposals(
    rows, live, queries, proposed_scores, labels, row_of, label_of, place, entries, beside,
    scores, ids, unsure, wanted, besides, k, least,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    CHUNK: tl.constexpr, KEPT: tl.constexpr, ALL: tl.constexpr, METRIC: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """The k best of the rows of a query's labels and buffered rows; and whether that is unsure.

    It is where fewer than `least` were found, or others may be as good as the last of these:
    entries of the index, which are worth no more than the worst that it proposed, where fewer than
    `least` of those were valid (`ALL`: there are no others); or rows of the buffer, which are worth
    no more than the last that is given.
    """
    query = tl.program_id(0).to(tl.int64)  # times 2,048 proposals: may exceed 32 bits
    slot = tl.arange(0, KEPT)
    own = queries + query * WIDTH
    _, length = scale_and_length(own, own, WIDTH, PART, PARTS, False)
    # Places that are empty hold keys that differ, so that a row takes one place.
    kept = tl.where(slot < k, NOTHING + slot.to(tl.int64), MOST)
    worst_kept = tl.min(kept, 0)
    num_valid = least * 0
    beyond = tl.max(tl.full([KEPT], float("-inf"), tl.float32), 0)
    for start in range(0, wanted + besides, CHUNK):
        number = start + tl.arange(0, CHUNK)
        row, valid = proposed_rows(
            labels + query * wanted, number, wanted, row_of, label_of, place, live
        )
        more, buffered = buffered_rows(beside + query * besides, number - wanted, besides, entries)
        num_valid += tl.sum(valid.to(tl.int32), 0)
        row, there = tl.where(buffered, more, row), valid | buffered
        worth = worths_of_rows(
            rows, row, there, own, length, STRIDE, WIDTH, PART, PARTS, CHUNK, METRIC
        )
        worth = tl.where(there, worth, float("-inf"))
        is_last = buffered & (number == wanted + besides - 1)
        beyond = tl.maximum(beyond, tl.max(tl.where(is_last, worth, float("-inf")), 0))
        found = keys_of(worth, row)
        kept, worst_kept = with_better(kept, worst_kept, found)
    kept = tl.where((slot < k) & (kept > ROWS_FROM), kept, NOTHING)
    last = stored(scores + query * k, ids + query * k, kept, k, least, KEPT, SIGN)
    lacks = (last == NOTHING) | ((beyond >= worth_of(last)) & (beyond > float("-inf")))
    if not ALL:
        end = query * wanted + wanted - 1
        hidden = (num_valid < least) & (tl.load(labels + end) >= 0)
        lacks = lacks | (hidden & (tl.load(proposed_scores + end) * SIGN > worth_of(last)))
    tl.store(unsure + query, lacks.to(tl.uint8))


@kernel(do_not_specialize=["count"])
def latest_entries(ids, place, live, latest, count, BLOCK: tl.constexpr):
    """Which of the buffer's first `count` entries are the latest of a live row."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    row = tl.load(ids + entry, mask=inside, other=0)
    is_live = tl.load(live + row, mask=inside, other=0) != 0
    is_latest = tl.load(place + row, mask=inside, other=0) == entry + 1
    tl.store(latest + entry, (is_latest & is_live).to(tl.uint8), mask=inside)
