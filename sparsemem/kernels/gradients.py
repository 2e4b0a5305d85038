"""The backward pass of the memory step, compiled; see steps.py."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import numpy as np

from sparsemem.kernels.compiled import (
    LINEAR_FROM,
    add_scaled,
    array_at,
    clear,
    content_weights,
    dot,
    given_or_zero,
    inverse_norm,
    kernel,
    oneplus,
    part,
    sigmoid,
    softmax,
)
from sparsemem.kernels.steps import GATES


@part
def softmax_backward(weights, gradient):
    """The gradient of the logits, in place of that of the weights."""
    mean = dot(weights, gradient)
    for i in range(len(weights)):
        gradient[i] = weights[i] * (gradient[i] - mean)


@part
def content_backward(values, width, rows, weights, gradient, to_values, to_rows):
    """From one head's content weights [K] to its query and strength and to the rows.

    `gradient` [K] is theirs; it is overwritten.
    """
    softmax_backward(weights, gradient)
    query, strength, to_query = values[:width], values[2 * width], to_values[:width]
    scale, beta = inverse_norm(query), oneplus(strength)
    to_beta, along = 0.0, 0.0
    for entry in range(len(weights)):
        row = rows[entry]
        norm = inverse_norm(row)
        similarity = dot(query, row) * scale * norm
        to_similarity = beta * gradient[entry]
        to_beta += gradient[entry] * similarity
        along += to_similarity * similarity
        add_scaled(to_rows[entry], to_similarity * scale * norm, query)
        add_scaled(to_rows[entry], -to_similarity * similarity * norm * norm, row)
        add_scaled(to_query, to_similarity * scale * norm, row)
    add_scaled(to_query, -along * scale * scale, query)
    to_values[2 * width] = to_beta * (1 if strength > LINEAR_FROM else sigmoid(strength))


@part
def mix_backward(links, last_weights, logits, content, gradient, to_logits, to_last):
    """Through pi1 b + pi2 c + pi3 f; the content weights' gradient takes the place of c's part."""
    k, modes = links.shape[1], logits.copy()
    softmax(modes)
    clear(to_logits)
    for entry in range(k):
        before, middle, after = gradient[entry], gradient[k + entry], gradient[2 * k + entry]
        to_logits[0] += before * dot(links[0, entry], last_weights)
        to_logits[1] += middle * content[entry]
        to_logits[2] += after * dot(links[1, entry], last_weights)
        add_scaled(to_last, modes[0] * before, links[0, entry])
        add_scaled(to_last, modes[2] * after, links[1, entry])
        gradient[k + entry] = modes[1] * middle
    softmax_backward(modes, to_logits)


@part
def read_backward(
    buffer, values, width, ids, links, last_weights, rows, weights, to_reads, to_weights,
    to_values, to_last,
):  # fmt: skip
    """From one head's reads [W] and read weights [R] to its values, its last read weights and
    the rows, whose gradients are added to the buffer [C, W].
    """
    entries = len(ids)
    k = entries // 3 if links.shape[1] else entries
    first = entries // 3 if links.shape[1] else 0
    gradient, to_rows, content = to_weights.copy(), np.empty_like(rows), weights[:k].copy()
    for entry in range(entries):
        gradient[entry] += dot(to_reads, rows[entry])
        clear(to_rows[entry])
        add_scaled(to_rows[entry], weights[entry], to_reads)
    by_content = rows[first : first + k]
    if links.shape[1]:
        content_weights(values[:width], values[2 * width], by_content, content)
        gates = 2 * width + GATES
        mix_backward(
            links, last_weights, values[gates:], content, gradient, to_values[gates:], to_last
        )
    part, to_part = gradient[first : first + k], to_rows[first : first + k]
    content_backward(values, width, by_content, content, part, to_values, to_part)
    for entry in range(entries):
        add_scaled(buffer[ids[entry]], 1, to_rows[entry])


@part
def write_backward(buffer, values, width, ids, last_weights, to_values, to_last):
    """From the rows' gradient to the words and gates [H, I] and last read weights of a write.

    At the erased rows the gradient ends.
    """
    heads, support = last_weights.shape
    for head in range(heads):
        word, to_word = values[head, width : 2 * width], to_values[head, width : 2 * width]
        gates, to_gates = values[head, 2 * width :], to_values[head, 2 * width :]
        gate, interpolation = sigmoid(gates[1]), sigmoid(gates[2])
        to_gate = to_interpolation = 0.0
        for entry in range(support + 1):
            row = buffer[ids[head, entry]]
            to_weight = dot(row, word)
            share, last = 1 - interpolation, 1.0
            if entry < support:
                share, last = interpolation, last_weights[head, entry]
                to_last[head, entry] += to_weight * gate * share
                to_interpolation += to_weight * gate * last
            else:
                to_interpolation -= to_weight * gate
            to_gate += to_weight * share * last
            add_scaled(to_word, gate * share * last, row)
        to_gates[1] = to_gate * gate * (1 - gate)
        to_gates[2] = to_interpolation * interpolation * (1 - interpolation)
    for head in range(heads):
        clear(buffer[ids[head, support]])


@kernel
def backward_step(like, sizes, addresses):
    """The gradients of the values and of the last read weights, out of those of the reads and of
    the read weights (address 0: zero) and of the rows, in the buffer, and what is left of that.
    """
    batch, heads, width, inputs, support, entries, linked, capacity = sizes
    whole = np.empty(0, np.int64)
    buffer = array_at(addresses[0], like, (batch, capacity, width))
    values = array_at(addresses[1], like, (batch, heads, inputs))
    write_ids = array_at(addresses[2], whole, (batch, heads, support + 1))
    last_weights = array_at(addresses[3], like, (batch, heads, support))
    ids = array_at(addresses[4], whole, (batch, heads, entries))
    links = array_at(addresses[5], like, (batch, heads, 2, linked, support))
    rows = array_at(addresses[6], like, (batch, heads, entries, width))
    weights = array_at(addresses[7], like, (batch, heads, entries))
    to_reads = given_or_zero(addresses[8], like, (batch, heads, width))
    to_weights = given_or_zero(addresses[9], like, (batch, heads, entries))
    to_values = array_at(addresses[10], like, (batch, heads, inputs))
    to_last = array_at(addresses[11], like, (batch, heads, support))
    for b in range(batch):
        for h in range(heads):
            clear(to_values[b, h])
            clear(to_last[b, h])
            read_backward(
                buffer[b], values[b, h], width, ids[b, h], links[b, h], last_weights[b, h],
                rows[b, h], weights[b, h], to_reads[b, h], to_weights[b, h], to_values[b, h],
                to_last[b, h],
            )  # fmt: skip
        write_backward(
            buffer[b], values[b], width, write_ids[b], last_weights[b], to_values[b], to_last[b]
        )


ENTRIES = {backward_step: (8, 12)}
