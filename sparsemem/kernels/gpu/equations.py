"""How Triton's functions are made, and the equations that several of them share.

Shape letters as in docs/architecture.md and ../steps.py. Arrays are as long as the next power of
two, which is what Triton wants: NEIGHBOURS for K, SUPPORT for S + 1, COLUMNS for W, SIZE for
others. What is behind the end of a list is masked, or such that it counts for nothing.

Constants stand on the right of tensors: where the interpreter finds one on the left, it takes the
result for a constant too.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import triton
import triton.language as tl

from sparsemem.indexes.metrics import COSINE_EPSILON

EPSILON = tl.constexpr(COSINE_EPSILON)
LINEAR_FROM = tl.constexpr(20.0)  # torch's softplus(x) is x from here on


def kernel(function: Any = None, **options: Any) -> Any:
    """Decorator of Triton's functions, of kernels as of their parts; options as of triton.jit."""
    if function is None:
        return partial(kernel, **options)
    return triton.jit(inspect.unwrap(function), **options)  # without a type checker's wrapper


@kernel
def inverse_norm(rows, AXIS: tl.constexpr):
    """1 / sqrt(|row|^2 + epsilon)."""
    return 1 / tl.sqrt(tl.sum(rows * rows, AXIS) + EPSILON)


@kernel
def oneplus(x):
    """1 + log(1 + e^x)."""
    return tl.where(x > LINEAR_FROM, x, tl.log(tl.exp(x) + 1)) + 1


@kernel
def load_vector(address, count, SIZE: tl.constexpr):
    """`count` numbers, and zeros behind them."""
    at = tl.arange(0, SIZE)
    return tl.load(address + at, mask=at < count, other=0)


@kernel
def load_table(address, count, width, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """A table [count, width], and zeros around it."""
    row, column = tl.arange(0, SIZE), tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    return tl.load(address + row[:, None] * width + column[None, :], mask=inside, other=0)


@kernel
def store_table(address, table, count, width, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    """The first `count` rows of `width` columns of a table."""
    row, column = tl.arange(0, SIZE), tl.arange(0, COLUMNS)
    inside = (row < count)[:, None] & (column < width)[None, :]
    tl.store(address + row[:, None] * width + column[None, :], table, mask=inside)


@kernel
def load_rows(table, ids, inside, width, COLUMNS: tl.constexpr):
    """Rows of a table at ids; zeros for those not `inside`."""
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(table + ids[:, None] * width + column[None, :], mask=mask, other=0)


@kernel
def store_rows(table, ids, inside, rows, width, COLUMNS: tl.constexpr):
    """Replace rows of a table at ids."""
    column = tl.arange(0, COLUMNS)
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(table + ids[:, None] * width + column[None, :], rows, mask=mask)


@kernel
def content_weights(query, strength, rows, K: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """softmax over K rows of beta cos(query, row) (eq. 4)."""
    factor = oneplus(strength) * inverse_norm(query, 0)
    logits = tl.sum(rows * query[None, :], 1) * inverse_norm(rows, 1) * factor
    inside = tl.arange(0, NEIGHBOURS) < K
    shifted = logits - tl.max(tl.where(inside, logits, -float("inf")), 0)
    weights = tl.where(inside, tl.exp(shifted), 0)
    return weights / tl.sum(weights, 0)


@kernel
def mode_weights(logits):
    """Softmax of three numbers: pi1, pi2, pi3."""
    first, second, third = tl.load(logits), tl.load(logits + 1), tl.load(logits + 2)
    largest = tl.maximum(tl.maximum(first, second), third)
    first, second, third = (
        tl.exp(first - largest),
        tl.exp(second - largest),
        tl.exp(third - largest),
    )
    total = first + second + third
    return first / total, second / total, third / total
