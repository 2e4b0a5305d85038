"""The best of a scan, and among equals those that come first.

A position and how good it is are one whole number, a *key*; no two are equal. Keys of positions
are not negative.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.kernels.gpu.equations import kernel

POSITION_BITS = tl.constexpr(31)
LAST_POSITION = tl.constexpr(2**31 - 1)
MIDDLE = tl.constexpr(2**30)  # grades are in 0 .. 2**31 - 1: float64 scores up to 4 are told apart
LARGEST = tl.constexpr(2.0**30 - 2**7)  # cell of the grid; a number of float32, too
LOWEST = tl.constexpr(-(2**40))  # below every key
HIGHEST = tl.constexpr(2**62)  # above every key


@kernel
def key_of(grade, position):
    """By grade, then the lower position."""
    return (grade.to(tl.int64) << POSITION_BITS) | (position.to(tl.int64) ^ LAST_POSITION)


@kernel
def position_of(key):
    """The position in a key."""
    return (key & LAST_POSITION) ^ LAST_POSITION


@kernel
def grade_of_score(score, GRID: tl.constexpr, ROUNDING: tl.constexpr):
    """The place of a score on the grid; not-a-number comes first.

    ROUNDING is so large that the sum has no bits behind the point: rounded as torch.round does.
    """
    cell = score * GRID + ROUNDING - ROUNDING
    cell = tl.minimum(tl.maximum(cell, -LARGEST), LARGEST)
    return tl.where(score == score, cell, LARGEST).to(tl.int64) + MIDDLE


@kernel
def grade_of_age(last_access):
    """The longer ago, the better; never is -1."""
    return -last_access + (2**30 - 1)


@kernel
def none_yet(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Keys before any was seen, below all others; behind the first COUNT such as stay."""
    place = tl.arange(0, SIZE).to(tl.int64)
    return tl.where(place < COUNT, -place - 1, HIGHEST)


@kernel
def keep_best(best, keys):
    """The best of both, in the place of `best`, in no order."""
    worst, candidate = tl.min(best, 0), tl.max(keys, 0)
    while candidate > worst:
        best = tl.where(best == worst, candidate, best)
        keys = tl.where(keys == candidate, LOWEST, keys)
        worst, candidate = tl.min(best, 0), tl.max(keys, 0)
    return best


@kernel
def in_order(best, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Positions of the COUNT best keys, best first; zeros behind them."""
    place = tl.arange(0, SIZE)
    inside = place < COUNT
    best = tl.where(inside, best, -place.to(tl.int64) + LOWEST)
    positions = tl.where(inside, position_of(best), 0)
    rank = tl.sum((best[None, :] > best[:, None]).to(tl.int32), 1)
    return tl.sum(tl.where(rank[None, :] == place[:, None], positions[None, :], 0), 1)
