"""Loops of an index over rows, compiled; the numpy and torch code is beside their callers.

Importing this imports Numba. Letters: n rows, W their width; Q queries, C candidates of each, K of
them kept.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import types

from sparsemem.indexes import lists, looping, metrics
from sparsemem.indexes.lists import OFFSET_BITS
from sparsemem.indexes.looping import compiled, fetch, files_of, stamp_of
from sparsemem.indexes.metrics import COSINE, COSINE_EPSILON, DISTANCE

SOURCES = stamp_of([Path(__file__), *files_of(lists, looping, metrics)])
AT_ONCE = 8  # queries whose entries are on their way together


def loop(function: Callable[..., Any]) -> Any:
    """Decorator of compiled functions."""
    return compiled(function, SOURCES)


fetch_rows = loop(looping.fetch_rows)


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
def scaled(row, is_cosine, vector):
    """A row as FAISS sees it: `kinds.comparable`."""
    scale = 1.0
    if is_cosine:
        norm = row.dtype.type(0)
        for i in range(len(row)):
            norm += row[i] * row[i]
        scale = 1 / np.sqrt(norm + COSINE_EPSILON)
    factor = row.dtype.type(scale)
    for i in range(len(row)):
        value = np.float32(row[i] * factor)
        vector[i] = value if np.isfinite(value) else np.float32(0)


@loop
def comparable(rows, is_cosine, vectors):
    """`kinds.comparable` of rows [n, W], into `vectors` [n, W]."""
    for entry in range(len(rows)):
        scaled(rows[entry], is_cosine, vectors[entry])


@loop
def staying(
    ids, label_of, places, chosen, centroids, place, held_rows, usual, farther, is_cosine, kept,
    labels, lists, vectors,
):  # fmt: skip
    """`Buffer.staying` of rows [n]: so many do, and are what `kept`, ... [n] begin with."""
    have_known(ids, label_of, chosen, place, places)
    count = 0
    for entry in range(len(ids)):
        id = ids[entry]
        label = label_of[id] - 1
        if label < 0:
            continue
        number, total = places[label] >> OFFSET_BITS, np.float32(0)
        centroid, vector = centroids[number], vectors[count]
        scaled(held_rows[place[id] - 1], is_cosine, vector)
        for i in range(len(vector)):
            total += (vector[i] - centroid[i]) * (vector[i] - centroid[i])
        if total <= max(usual, farther * chosen[id]):
            kept[count], labels[count], lists[count] = id, label, number
            count += 1
    return count


@loop
def have_known(ids, label_of, chosen, place, places):
    """Have on their way from memory what is known of rows [n], then of their labels."""
    first, second, third = label_of.ctypes.data, chosen.ctypes.data, place.ctypes.data
    for id in ids:
        fetch(first + id * label_of.itemsize)
        fetch(second + id * chosen.itemsize)
        fetch(third + id * place.itemsize)
    for id in ids:
        fetch(places.ctypes.data + (label_of[id] - 1) * places.itemsize)


@loop
def valid(k, labels, row_of, label_of, place, live, ids):
    """`Derived._rows_of`: into `ids` [Q, C]; which queries are short [Q]."""
    short = np.zeros(len(labels), np.bool_)
    for start in range(0, len(labels), AT_ONCE):
        stop = min(start + AT_ONCE, len(labels))
        have_ready(labels[start:stop], row_of, label_of, place, live)
        for query in range(start, stop):
            count, emptied = 0, False
            for entry in range(labels.shape[1]):
                label, id = labels[query, entry], np.int64(-1)
                if label < 0:
                    emptied = True
                else:
                    row = row_of[label]
                    if label_of[row] == label + 1 and place[row] == 0 and live[row]:
                        id = row
                        count += 1
                ids[query, entry] = id
            short[query] = count < k and not emptied
    return short


@loop
def have_ready(labels, row_of, label_of, place, live):
    """Have on their way from memory, all at once, what is known of labels [q, C]."""
    rows = row_of.ctypes.data
    for query in range(len(labels)):
        for label in labels[query]:
            if label >= 0:
                fetch(rows + label * row_of.itemsize)
    first, second, third = label_of.ctypes.data, place.ctypes.data, live.ctypes.data
    for query in range(len(labels)):
        for label in labels[query]:
            if label >= 0:
                row = row_of[label]
                fetch(first + row * label_of.itemsize)
                fetch(second + row * place.itemsize)
                fetch(third + row)


@loop
def score(metric, queries, rows, ids, missing, scores):
    """`Scoring.own` of rows [n, W] at `ids` [Q, C], into `scores` [Q, C]; `missing` where there is
    no row, or no number.
    """
    zero = queries.dtype.type(0)
    if len(ids):
        fetch_rows(rows, ids[0])
    for q in range(len(queries)):
        if q + 1 < len(queries):
            fetch_rows(rows, ids[q + 1])
        query, norm = queries[q], zero
        for i in range(len(query)):
            norm += query[i] * query[i]
        factor = 1 / np.sqrt(norm + COSINE_EPSILON)
        for entry in range(ids.shape[1]):
            if ids[q, entry] < 0:
                scores[q, entry] = missing
                continue
            row, total, square = rows[ids[q, entry]], zero, zero
            if metric == DISTANCE:
                for i in range(len(row)):
                    total += (row[i] - query[i]) * (row[i] - query[i])
            else:
                for i in range(len(row)):
                    total += row[i] * query[i]
                    square += row[i] * row[i]
            value = total
            if metric == COSINE:
                value = queries.dtype.type(total * factor / np.sqrt(square + COSINE_EPSILON))
            scores[q, entry] = value if value == value else missing


@loop
def best(scores, ids, sign, best_scores, best_ids):
    """`best_of` of candidates [Q, C], into [Q, K] filled beforehand with the worst score, id -1."""
    keep = best_ids.shape[1]
    for query in range(len(ids)):
        found = 0
        for entry in range(ids.shape[1]):
            id, value = ids[query, entry], scores[query, entry]
            if id < 0:
                continue
            place = min(found, keep)
            while place > 0 and (
                sign * best_scores[query, place - 1] < sign * value
                or (best_scores[query, place - 1] == value and best_ids[query, place - 1] > id)
            ):
                if place < keep:
                    best_scores[query, place] = best_scores[query, place - 1]
                    best_ids[query, place] = best_ids[query, place - 1]
                place -= 1
            if place < keep:
                best_scores[query, place], best_ids[query, place] = value, id
                found = min(found + 1, keep)


@loop
def top(metric, sign, missing, queries, rows, ids, best_scores, best_ids):
    """`Scoring.top` of rows [n, W] at `ids` [Q, C], into [Q, K] as `best` has them."""
    scores = np.empty(ids.shape, queries.dtype)
    score(metric, queries, rows, ids, missing, scores)
    best(scores, ids, sign, best_scores, best_ids)


def compile_all() -> None:
    """Compile for both dtypes that rows are computed with, or load what was compiled before."""
    whole, places = types.int64[::1], types.int32[::1]
    flags, number, many = types.boolean[::1], types.int64, types.int64[:, ::1]
    narrow = types.float32[:, ::1]
    valid.compile((number, many, whole, whole, places, flags, many))
    for rows in (types.float32[:, ::1], types.float64[:, ::1]):
        held = (places, whole, flags, whole, rows)
        mark.compile((whole, rows, number, number, *held, whole))
        drop.compile((whole, number, places, flags, whole, rows))
        comparable.compile((rows, types.boolean, narrow))
        known = (whole, whole, whole, types.float32[::1], narrow, places, rows)
        bounds = (types.float64, types.float64, types.boolean)
        staying.compile((*known, *bounds, whole, whole, whole, narrow))
        score.compile((number, rows, rows, many, types.float64, rows))
        top.compile((number, number, types.float64, rows, rows, many, rows, many))
