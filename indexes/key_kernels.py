"""What kernels that rank rows on a GPU have in common: keys, and scores computed from the rows.

A *key* is a worth (a score in the direction in which more is better) and a number in one int64:
the greater key has the greater worth, or the same worth and the smaller number. So the order of
keys is "best first, ties by number", no two keys are equal, and to rank is to take maxima.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import triton
import triton.language as tl

NOTHING = tl.constexpr(-(2**63))  # below the key of any row
ROWS_FROM = tl.constexpr(-(2**63) + 2**32)  # below the key of any row, too
MOST = tl.constexpr(2**63 - 1)  # above the key of any row
LAST = tl.constexpr(2**31 - 1)  # the greatest number that a key holds
WORST = tl.constexpr(-3.4028234663852886e38)  # of a live row whose score is not a number
LEAST_SCALE = tl.constexpr(2.0**-20)
EPSILON = tl.constexpr(1e-6)  # COSINE_EPSILON


def kernel(function: Any = None, **options: Any) -> Any:
    """Decorator of Triton's functions; options as of triton.jit."""
    if function is None:
        return partial(kernel, **options)
    return triton.jit(inspect.unwrap(function), **options)  # without a type checker's wrapper


@kernel
def keys_of(worth, numbers):
    """int64 keys of float32 worths, -inf for what is not there, and numbers 0 .. 2^31 - 1."""
    worth = tl.where(worth == 0.0, 0.0, worth)  # no negative zero
    bits = worth.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & LAST)  # integers in the order of the floats
    keys = (ordered.to(tl.int64) << 32) | (numbers ^ LAST).to(tl.int64)
    return tl.where(worth == float("-inf"), NOTHING, keys)


@kernel
def worth_of(keys):
    """The worths in keys; -inf where there is nothing, or no number."""
    ordered = (keys >> 32).to(tl.int32)
    worth = (ordered ^ ((ordered >> 31) & LAST)).to(tl.float32, bitcast=True)
    return tl.where((keys == NOTHING) | (worth <= WORST), float("-inf"), worth)


@kernel
def numbers_of(keys):
    """The numbers in keys; -1 where there is nothing."""
    return tl.where(keys == NOTHING, -1, (keys & LAST) ^ LAST)


@kernel
def scale_for(largest):
    """One by the power of two at or below the largest number of a query, were that not tiny."""
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    return 1.0 / tl.maximum(exponent.to(tl.float32, bitcast=True), LEAST_SCALE)


@kernel
def scale_and_length(query, center, WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
                     CENTERED: tl.constexpr):  # fmt: skip
    """`scale_for` a query, less the center, and its squared length."""
    largest = tl.max(tl.zeros([PART], tl.float32), 0)
    length = tl.max(tl.zeros([PART], tl.float32), 0)
    for start in tl.static_range(0, PARTS * PART, PART):
        w = start + tl.arange(0, PART)
        values = tl.load(query + w, mask=w < WIDTH, other=0.0)
        if CENTERED:
            values = values - tl.load(center + w, mask=w < WIDTH, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 0))
        length += tl.sum(values * values, 0)
    return scale_for(largest), length


@kernel
def worths_of_rows(
    rows, row, there, query, length,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    COUNT: tl.constexpr, METRIC: tl.constexpr,
):  # fmt: skip
    """The worth of each of COUNT rows, if it is there, as `Metric.scores` has it.

    Row by row, so that equal rows have equal scores wherever they stand.
    """
    dots = tl.zeros([COUNT], tl.float32)
    squares = tl.zeros([COUNT], tl.float32)
    for start in tl.static_range(0, PARTS * PART, PART):
        w = start + tl.arange(0, PART)
        present = there[:, None] & (w < WIDTH)[None, :]
        part = tl.load(rows + row[:, None] * STRIDE + w[None, :], mask=present, other=0.0)
        wide = part.to(tl.float32)
        own = tl.load(query + w, mask=w < WIDTH, other=0.0)
        if METRIC == "l2":
            wide = wide - own[None, :]
        else:
            dots += tl.sum(wide * own[None, :], 1)
        if METRIC != "ip":
            squares += tl.sum(wide * wide, 1)
    if METRIC == "l2":
        worth = -squares
    elif METRIC == "cosine":
        worth = dots * tl.rsqrt(squares + EPSILON) * tl.rsqrt(length + EPSILON)
    else:
        worth = dots
    return tl.where(worth > WORST, worth, WORST)  # false for what is not a number


@kernel
def with_better(kept, least, found):
    """The greatest of the keys that are kept and found, as many as were kept; and their least."""
    candidate = tl.max(found, 0)
    while candidate > least:
        kept = tl.where(kept == least, candidate, kept)
        least = tl.min(kept, 0)
        found = tl.where(found == candidate, NOTHING, found)
        candidate = tl.max(found, 0)
    return kept, least
