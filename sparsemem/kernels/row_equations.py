"""Rows of a table, compiled: a step of the row optimisers, and gradients through scores.

The equations of the steps are those of `sparsemem/optim/{sgd,adagrad,adam}.py`, those of the
gradients `Metric.gradients`'. Letters: N rows of a table, W their width, n entries, Q queries,
K rows of each.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
from __future__ import annotations

import numpy as np

from sparsemem.indexes.looping import LINE, fetch
from sparsemem.indexes.metrics import COSINE, PRODUCT
from sparsemem.kernels.compiled import (
    add_scaled,
    array_at,
    assign,
    clear,
    dot,
    given_or_zero,
    inverse_norm,
    kernel,
    part,
)

SGD, ADAGRAD, ADAM = 0, 1, 2  # what `step_rows` does
OUT_OF_RANGE = -1
AHEAD = 4  # entries whose rows are on their way: a row far away takes as long as two steps


@part
def add_up(ids, order, values, place, total):
    """Sum, in order, the entries of the row whose first is at `place`; where the next row is."""
    row = ids[place]
    assign(total, values[order[place]])
    place += 1
    while place < len(ids) and ids[place] == row:
        add_scaled(total, 1, values[order[place]])
        place += 1
    return place


@part
def is_due(row, live, frozen, selected):
    """Whether a row may be stepped; marks that are empty say nothing."""
    if len(live) and (not live[row] or frozen[row]):
        return False
    return len(selected) == 0 or selected[row] != 0


@part
def sgd(row, gradient, velocity, numbers):
    """`RowSGD`'s step; `velocity` is empty without momentum."""
    number = row.dtype.type
    lr, decay = number(numbers[0]), number(numbers[1])
    momentum = number(numbers[2])
    if len(velocity) == 0:
        for i in range(len(row)):
            row[i] -= lr * (gradient[i] + decay * row[i])
        return
    # Nesterov's step is gradient + momentum velocity, the other the velocity.
    own, share = (number(1), momentum) if numbers[3] != 0 else (number(0), number(1))
    for i in range(len(row)):
        step = gradient[i] + decay * row[i]
        velocity[i] = momentum * velocity[i] + step
        row[i] -= lr * (own * step + share * velocity[i])


@part
def adagrad(row, gradient, total, numbers):
    """`RowAdagrad`'s step; `total` [1] is the row's accumulator."""
    number = row.dtype.type
    lr, decay, eps = number(numbers[0]), number(numbers[1]), number(numbers[2])
    for i in range(len(row)):
        gradient[i] += decay * row[i]
    total[0] += dot(gradient, gradient) / number(len(row))
    add_scaled(row, -lr / (np.sqrt(total[0]) + eps), gradient)


@part
def adam(row, gradient, mean, square, count, numbers):
    """`RowAdam`'s step; `count` [1] is the number of the row's steps.

    Moments of a row that was never stepped are written before they are read: a page that is read
    first takes two page faults, each longer than the step.
    """
    number = row.dtype.type
    decay, shrink, eps = number(numbers[1]), number(numbers[2]), number(numbers[3])
    rate1, beta2, rate2 = number(numbers[4]), number(numbers[6]), number(numbers[7])
    if count[0] == 0:
        clear(mean)
        clear(square)
    count[0] += 1
    scale = number(numbers[0] / -np.expm1(count[0] * numbers[5]))
    upscale = number(1 / -np.expm1(count[0] * numbers[8]))
    for i in range(len(row)):
        step = gradient[i] + decay * row[i]
        mean[i] += rate1 * (step - mean[i])
        square[i] = beta2 * square[i] + rate2 * step * step
        row[i] = shrink * row[i] - scale * mean[i] / (np.sqrt(square[i] * upscale) + eps)


@part
def fetch_all(row, sizes, itemsize, addresses):
    """Have a row, its state and its marks on their way from memory."""
    _, _, width, _, first_stride, second_stride = sizes
    for address, stride in (
        (addresses[4], width),
        (addresses[5], first_stride),
        (addresses[6], second_stride),
    ):
        for offset in range(0, min(width, stride) * itemsize, LINE):
            fetch(address + row * stride * itemsize + offset)
    if addresses[7]:
        fetch(addresses[7] + row * itemsize)
    for mark in addresses[8:]:
        if mark:
            fetch(mark + row)


@kernel
def step_rows(like, sizes, numbers, addresses):
    """Step each row that has entries and may be stepped; how many there were, `stepped` says which.

    OUT_OF_RANGE, and nothing done, if one is not in the table.
    """
    kind, count, width, num_rows, first_stride, second_stride = sizes
    whole, marks = np.empty(0, np.int64), np.empty(0, np.uint8)
    ids = array_at(addresses[0], whole, (count,))
    order = array_at(addresses[1], whole, (count,))
    values = array_at(addresses[2], like, (count, width))
    stepped = array_at(addresses[3], whole, (count,))
    table = array_at(addresses[4], like, (num_rows, width))
    first = array_at(addresses[5], like, (num_rows * first_stride,))
    second = array_at(addresses[6], like, (num_rows * second_stride,))
    narrow = array_at(addresses[7], like, (num_rows,))
    live = array_at(addresses[8], marks, (num_rows if addresses[8] else 0,))
    frozen = array_at(addresses[9], marks, (num_rows if addresses[9] else 0,))
    selected = array_at(addresses[10], marks, (num_rows if addresses[10] else 0,))
    if count and (ids[0] < 0 or ids[count - 1] >= num_rows):
        return OUT_OF_RANGE
    gradient, place, done = np.empty(width, like.dtype), 0, 0
    while place < count:
        fetch_all(ids[min(place + AHEAD, count - 1)], sizes, like.itemsize, addresses)
        row = ids[place]
        place = add_up(ids, order, values, place, gradient)
        if not is_due(row, live, frozen, selected):
            continue
        at, other = row * first_stride, row * second_stride
        one = first[at : at + min(width, first_stride)]
        if kind == SGD:
            sgd(table[row], gradient, one, numbers)
        elif kind == ADAGRAD:
            adagrad(table[row], gradient, narrow[row : row + 1], numbers)
        else:
            adam(
                table[row], gradient, one, second[other : other + width], narrow[row : row + 1],
                numbers,
            )  # fmt: skip
        stepped[done] = row
        done += 1
    return done


@part
def score_factors(metric, query_norm, row_norm, score, gradient):
    """a, b, c of the gradients: a query + b row of the row; a row + c query of the query.

    Whole in float64, so that all metrics give one type.
    """
    if metric == COSINE:
        along = gradient * score
        return (
            gradient * query_norm * row_norm,
            -along * row_norm * row_norm,
            -along * query_norm * query_norm,
        )
    if metric == PRODUCT:
        return gradient, 0.0, 0.0
    return -2 * gradient, 2 * gradient, 2 * gradient


@kernel
def score_gradients(like, sizes, addresses):
    """Gradients of queries [Q, W] and rows [Q, K, W], from those of scores and of rows (0: none).

    A score of no row (id -1) has none.
    """
    metric, num_queries, k, width = sizes
    ids = array_at(addresses[0], np.empty(0, np.int64), (num_queries, k))
    queries = array_at(addresses[1], like, (num_queries, width))
    rows = array_at(addresses[2], like, (num_queries, k, width))
    scores = array_at(addresses[3], like, (num_queries, k))
    by_score = array_at(addresses[4], like, (num_queries, k))
    by_row = given_or_zero(addresses[5], like, (num_queries, k, width))
    of_queries = array_at(addresses[6], like, (num_queries, width))
    of_rows = array_at(addresses[7], like, (num_queries, k, width))
    for q in range(num_queries):
        query, of_query, share = queries[q], of_queries[q], like.dtype.type(0)
        query_norm = inverse_norm(query)
        clear(of_query)
        for entry in range(k):
            row, of_row = rows[q, entry], of_rows[q, entry]
            assign(of_row, by_row[q, entry])
            if ids[q, entry] >= 0:
                a, b, c = score_factors(
                    metric,
                    query_norm,
                    inverse_norm(row),
                    np.float64(scores[q, entry]),
                    np.float64(by_score[q, entry]),
                )
                add_scaled(of_row, a, query)
                add_scaled(of_row, b, row)
                add_scaled(of_query, a, row)
                share += c
        add_scaled(of_query, share, query)


# Sizes, numbers and addresses of each.
ENTRIES = {step_rows: (6, 9, 11), score_gradients: (4, 8)}
