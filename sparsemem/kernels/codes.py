"""Directions as codes: whole numbers from -LENGTH to LENGTH, a byte each; compiled.

Codes of a node lie in blocks of LANES, transposed, [blocks, W, LANES]: a query's products with a
block run on vectors of 16 bits, and read a quarter of what floats would take, line after line of
memory.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
from __future__ import annotations

import numpy as np

from sparsemem.kernels.compiled import assign, clear, part
from sparsemem.kernels.lanes import LANES, multiply

LENGTH = 127.0  # of a code, as a vector
LONGEST = 240.0  # of a query's: with wide rows less, as the product has to fit 16 bits
LARGEST = 32_767.0
# In cosines: four standard deviations of what rounding the code of a row and of a query does.
MARGIN = 4 * (1 / 12) ** 0.5 * (1 / LENGTH**2 + 1 / LONGEST**2) ** 0.5
ROUNDS = 4  # of 2-means, when a node is split
PART = 4  # a part of a split node has a quarter of its members, at least


@part
def encode(row, scale, length, code):
    """A row times a scale, which makes its length 1, as a code. Not-a-number becomes 0."""
    for j in range(len(row)):
        number = np.rint(row[j] * scale * length)
        code[j] = np.int64(number) if -length <= number <= length else 0


@part
def query_length(width):
    """How long the code of a query may be."""
    rounding = np.sqrt(width) / 2  # which may make a code longer
    return max(1.0, min(LONGEST, np.floor(LARGEST / (LENGTH + rounding) - rounding)))


@part
def code_at(codes, place):
    """The code [W] at a place of a node."""
    return codes[place // LANES, :, place % LANES]


@part
def products(codes, count, query, scores):
    """Products of a query's code [W] with the first of the codes of a node.

    And with what is behind those in the last block, which mean nothing.
    """
    for start in range(0, count, LANES):  # what overflows on the way comes back
        block = codes[start // LANES].ctypes.data
        multiply(block, len(query), query.ctypes.data, scores[start:].ctypes.data)


@part
def divide(kept, sides, means):
    """Part the first of the codes of a node in two by 2-means of directions: sides [n],
    means [2, W].

    Where one part would be too small, it gets those that lean towards it most.
    """
    leaning, codes = np.empty(len(sides)), np.empty((means.shape[1], len(sides)), np.int8)
    for i in range(len(sides)):
        assign(codes[:, i], code_at(kept, i))
    for i in range(len(sides)):
        sides[i] = 0
    first, second = np.int64(0), np.int64(1)
    mean_direction(codes, sides, first, means[0])
    for side in (0, 1):  # begin with the one least like all of them, and the one least like that
        lean(codes, means[0], leaning)
        farthest = 0
        for i in range(len(sides)):
            if leaning[i] < leaning[farthest]:
                farthest = i
        for j in range(len(codes)):
            means[side, j] = codes[j, farthest]
    for _ in range(ROUNDS):
        lean(codes, means[1] - means[0], leaning)
        for i in range(len(sides)):
            sides[i] = 1 if leaning[i] > 0 else 0
        balance(leaning, sides)
        mean_direction(codes, sides, first, means[0])
        mean_direction(codes, sides, second, means[1])


@part
def lean(codes, axis, leaning):
    """How far codes [W, n] point along an axis."""
    clear(leaning)
    for j in range(len(codes)):
        for i in range(len(leaning)):
            leaning[i] += axis[j] * codes[j, i]


@part
def mean_direction(codes, sides, side, mean):
    """The mean direction of those codes [W, n] that are on a side; as long as a code."""
    total = 0.0
    for j in range(len(codes)):
        entry = 0
        for i in range(len(sides)):
            entry += codes[j, i] * (sides[i] == side)
        mean[j] = entry
        total += mean[j] * mean[j]
    for j in range(len(codes)):
        mean[j] *= LENGTH / np.sqrt(total) if total > 0 else 0


@part
def balance(leaning, sides):
    """Move those that lean most until both sides have a quarter."""
    count, second = len(sides), sides.sum()
    side = 1 if second < count // PART else 0
    sign, missing = 2 * side - 1, count // PART - (second if side else count - second)
    for _ in range(missing):
        chosen = -1
        for i in range(count):
            if sides[i] != side and (chosen < 0 or sign * leaning[i] >= sign * leaning[chosen]):
                chosen = i
        sides[chosen] = side
