"""Loops over the changed rows of an index, compiled; the numpy code is beside their callers.

Importing this imports Numba. Letters: n rows, W their width, C room in the buffer.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.errors import NumbaError

from sparsemem.indexes.metrics import COSINE_EPSILON


def loop(function: Callable[..., Any]) -> Any:
    """Decorator of compiled functions; sums may be added up in any order."""
    function = inspect.unwrap(function)  # without a type checker's wrapper
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"reassoc", "contract"}
    try:
        return numba.njit(function, cache=True, **options)
    except (RuntimeError, NumbaError):  # there is no folder that a cache could be written to
        return numba.njit(function, **options)


@loop
def mark(ids, rows, change, count, place, marks, waits, held_ids, held_rows, idle):
    """`Buffer.mark` of rows [n, W], of which `count` are held: how many are now, and how many
    did not wait before, which `idle` [n] begins with.
    """
    woken = 0
    for entry in range(len(ids)):
        id = ids[entry]
        if place[id] == 0:
            held_ids[count] = id
            count += 1
            place[id] = count
        held = held_rows[place[id] - 1]
        for i in range(len(held)):
            held[i] = rows[entry, i]
        marks[id] = change
        if not waits[id]:
            waits[id] = True
            idle[woken] = id
            woken += 1
    return count, woken


@loop
def drop(ids, count, place, waits, held_ids, held_rows):
    """`Buffer.drop` of rows [n]: how many are held now, and how many of those gone waited."""
    waited = 0
    for id in ids:
        waited += waits[id]
        waits[id] = False
        hole = place[id] - 1
        place[id] = 0
        count -= 1
        if hole < count:  # the last one moves there
            held_ids[hole] = held_ids[count]
            place[held_ids[count]] = hole + 1
            to, last = held_rows[hole], held_rows[count]
            for i in range(len(to)):
                to[i] = last[i]
    return count, waited


@loop
def look(ids, place, held_rows, lists, centroids, is_cosine, vectors):
    """Held rows [n, W] as FAISS sees them (`comparable`), into `vectors`; how far, squared, each is
    from the centroid of its list.
    """
    squares = np.empty(len(ids), np.float32)
    for entry in range(len(ids)):
        row, vector = held_rows[place[ids[entry]] - 1], vectors[entry]
        centroid, scale, total = centroids[lists[entry]], 1.0, np.float32(0)
        if is_cosine:
            norm = row.dtype.type(0)
            for i in range(len(row)):
                norm += row[i] * row[i]
            scale = 1 / np.sqrt(norm + COSINE_EPSILON)
        factor = row.dtype.type(scale)
        for i in range(len(row)):
            value = np.float32(row[i] * factor)
            vector[i] = value if np.isfinite(value) else np.float32(0)
            total += (vector[i] - centroid[i]) * (vector[i] - centroid[i])
        squares[entry] = total
    return squares


def compile_all() -> None:
    """Compile for both dtypes that rows are computed with, or load what was compiled before."""
    whole, places = types.int64[::1], types.int32[::1]
    flags, number = types.boolean[::1], types.int64
    narrow = types.float32[:, ::1]
    for rows in (types.float32[:, ::1], types.float64[:, ::1]):
        held = (places, whole, flags, whole, rows)
        mark.compile((whole, rows, number, number, *held, whole))
        drop.compile((whole, number, places, flags, whole, rows))
        look.compile((whole, places, rows, whole, narrow, types.boolean, narrow))
