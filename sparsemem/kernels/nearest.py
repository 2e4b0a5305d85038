"""Which members of some nodes of a tree have the largest products with a query; compiled.

A level and its nodes are those of tree.py.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
from __future__ import annotations

import numpy as np

from sparsemem.kernels.codes import LENGTH, MARGIN, products, query_length
from sparsemem.kernels.compiled import insert, part
from sparsemem.kernels.lanes import LANES, at_least, lowest

NONE, LOWEST = -1, -(2**15)


@part
def scan(level, nodes, query, best, kept, scores):
    """The members of nodes with the largest products, ties by number: as many as `best` has room
    for. The last but `kept` of them are only such as come within the margin of the one before;
    NONE behind them. `scores` [len(nodes), blocks * LANES] is overwritten.
    """
    cells = np.empty(len(best), np.int64)
    found, least = np.int64(0), np.int64(LOWEST)  # not literals: Numba compiles those apart
    for i in range(len(best)):
        best[i] = NONE
    for i in range(len(nodes)):
        if nodes[i] != NONE:
            node, count = nodes[i], level.counts[nodes[i]]
            products(level.codes[node], count, query, scores[i])
            found, least = enter_best(
                cells[:kept], best[:kept], found, least, scores[i], level.members[node], count
            )
    if found < kept or kept == len(best):
        return
    margin = np.int64(MARGIN * LENGTH * query_length(len(query)))
    enough = max(least - margin, np.int64(LOWEST))
    if collect(best, enough, scores, level, nodes) <= len(best):
        return
    found = np.int64(0)
    for i in range(len(nodes)):
        if nodes[i] != NONE:
            node, count = nodes[i], level.counts[nodes[i]]
            found, enough = enter_best(
                cells, best, found, enough, scores[i], level.members[node], count
            )


@part
def collect(best, least, scores, level, nodes):
    """Put members of at least a score into `best`, in no order, while it has room. How many there
    are.
    """
    found = 0
    for i in range(len(nodes)):
        count = level.counts[nodes[i]] if nodes[i] != NONE else 0
        for start in range(0, count, LANES):
            bits = large(scores[i, start:], count - start, least)
            while bits:
                if found < len(best):
                    best[found] = level.members[nodes[i], start + lowest(bits)]
                bits &= bits - 1
                found += 1
    return found


@part
def large(scores, count, least):
    """Which of the first `count` of LANES scores are at least so much: a bit for each."""
    known = (1 << count) - 1 if count < LANES else -1
    return at_least(scores.ctypes.data, least) & known


@part
def enter_best(cells, best, found, least, scores, members, count):
    """Put members of at least a score where they belong among the best so far. How many these
    are, and what a score has to be from now on.
    """
    for start in range(0, count, LANES):
        bits = large(scores[start:], count - start, least)
        while bits:
            place = start + lowest(bits)
            bits &= bits - 1
            if scores[place] >= least:
                found, _ = insert(cells, best, found, scores[place], members[place])
                if found == len(best):
                    least = max(least, cells[found - 1])
    return found, least
