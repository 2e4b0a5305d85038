"""How kernels are compiled: one way for all. Importing this imports Numba.

Numba keeps what it compiled on disk and makes it anew when the file of the function that was
asked for changes. These functions call those of other files: what is kept of them is that of the
contents of all.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from sparsemem.indexes import looping, metrics
from sparsemem.indexes.looping import compiled, files_of, stamp_of
from sparsemem.indexes.metrics import COSINE_EPSILON
from sparsemem.memory import usage

# What is compiled holds constants of other modules, too.
FILES = [*sorted(Path(__file__).parent.glob("*.py")), *files_of(looping, metrics, usage)]
SOURCES = stamp_of(FILES)

LINEAR_FROM = 20.0  # torch's softplus(x) is x from here on


def kernel(function: Callable[..., Any], **options: Any) -> Any:
    """Decorator of compiled functions that Python calls; see `compile_all`."""
    return compiled(function, SOURCES, **options)


def part(function: Callable[..., Any], **options: Any) -> Any:
    """Decorator of compiled functions that kernels call; each is compiled for the types that it is
    called with. Python may not call one: it would crash. What it would need for that takes as long
    to compile as half of the rest.
    """
    return kernel(function, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


def strict_part(function: Callable[..., Any]) -> Any:
    """Decorator of parts whose sums are added up and rounded as they stand."""
    return part(function, fastmath=False)


fetch_rows = part(looping.fetch_rows)


@intrinsic
def pointer(_context, address, like):
    """An address (an integer) as a pointer to numbers of the type that an array `like` holds."""
    signature = types.CPointer(like.dtype)(address, like)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return signature, generate


carray: Any = vars(numba)["carray"]  # which is not listed in its types


@part
def array_at(address, like, shape):
    """The array of a shape at an address; its dtype is that of `like`."""
    return carray(pointer(address, like), shape)  # type: ignore[call-arg]


@part
def dot(a, b):
    """a . b of vectors."""
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@part
def add_scaled(to, factor, row):
    """to += factor row, in the dtype of `to`."""
    scale = to.dtype.type(factor)
    for i in range(len(to)):
        to[i] += scale * row[i]


@part
def assign(to, row):
    """to = row. As `to[:] = row`, which takes a second to compile."""
    for i in range(len(to)):
        to[i] = row[i]


@part
def clear(to):
    """to = 0."""
    for i in range(len(to)):
        to[i] = 0


@part
def inverse_norm(row):
    """1 / sqrt(|row|^2 + epsilon)."""
    return 1 / np.sqrt(dot(row, row) + COSINE_EPSILON)


@part
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + np.exp(-x))


@part
def oneplus(x):
    """1 + log(1 + e^x)."""
    return 1 + (x if x > LINEAR_FROM else np.log1p(np.exp(x)))


@part
def softmax(values):
    """Softmax of a short vector, in place."""
    largest, total = values[0], 0.0
    for i in range(len(values)):
        largest = max(largest, values[i])
    for i in range(len(values)):
        values[i] = np.exp(values[i] - largest)
        total += values[i]
    for i in range(len(values)):
        values[i] /= total


@part
def insert(cells, ids, found, cell, id):
    """Put an id where it belongs among the best so far: by cell, then the lower id.

    How many there are now, and the place (-1: it is not among them).
    """
    last = len(ids) - 1
    if found > last:
        if cells[last] > cell or (cells[last] == cell and ids[last] <= id):
            return found, -1
        found = last
    place = found
    while place > 0 and (
        cells[place - 1] < cell or (cells[place - 1] == cell and ids[place - 1] > id)
    ):
        cells[place], ids[place] = cells[place - 1], ids[place - 1]
        place -= 1
    cells[place], ids[place] = cell, id
    return found + 1, place


@part
def content_weights(query, strength, rows, weights):
    """softmax over rows [K, W] of beta cos(query, row) (eq. 4)."""
    factor = oneplus(strength) * inverse_norm(query)
    for entry in range(len(rows)):
        weights[entry] = factor * (dot(query, rows[entry]) * inverse_norm(rows[entry]))
    softmax(weights)


@part
def given_or_zero(address, like, shape):
    """The array at an address; zeros for address 0."""
    return array_at(address, like, shape) if address else np.zeros(shape, like.dtype)
