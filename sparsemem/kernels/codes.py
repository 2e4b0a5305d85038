"""Directions as codes: whole numbers from -LENGTH to LENGTH, a byte each; compiled.

Codes of a node lie transposed, [W, S]: a query's products with all of them run on vectors of 16
bits, and read a quarter of what floats would take.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from sparsemem.kernels.compiled import kernel

LENGTH = 127.0  # of a code, as a vector
LONGEST = 240.0  # of a query's: with wide rows less, as the product has to fit 16 bits
LARGEST = 32_767.0
# In cosines: four standard deviations of what rounding the code of a row and of a query does.
MARGIN = 4 * (1 / 12) ** 0.5 * (1 / LENGTH**2 + 1 / LONGEST**2) ** 0.5


@kernel
def encode(row, scale, length, code):
    """A row times a scale, which makes its length 1, as a code. Not-a-number becomes 0."""
    for j in range(len(row)):
        number = np.rint(row[j] * scale * length)
        code[j] = np.int64(number) if -length <= number <= length else 0


@kernel
def query_length(width):
    """How long the code of a query may be."""
    rounding = np.sqrt(width) / 2  # which may make a code longer
    return min(LONGEST, np.floor(LARGEST / (LENGTH + rounding) - rounding))


@kernel
def products(codes, count, query, scores):
    """Products of a query's code [W] with the first of the codes [W, S] of a node. The largest."""
    width = len(query)
    for s in range(count):
        scores[s] = 0
    for j in range(0, width - 3, 4):  # what overflows on the way comes back
        a, b, c, d = query[j], query[j + 1], query[j + 2], query[j + 3]
        first, second, third, fourth = codes[j], codes[j + 1], codes[j + 2], codes[j + 3]
        for s in range(count):
            scores[s] += a * first[s] + b * second[s] + c * third[s] + d * fourth[s]
    for j in range(width - width % 4, width):
        a, first = query[j], codes[j]
        for s in range(count):
            scores[s] += a * first[s]
    largest = scores[0]
    for s in range(count):
        largest = max(largest, scores[s])
    return largest
