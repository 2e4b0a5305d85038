"""The backward pass of a step: through the reads into the gradient buffer, then through the write
out of it. The equations are those of ../gradients.py.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton.language as tl

from sparsemem.kernels.gpu.equations import (
    LINEAR_FROM,
    content_weights,
    inverse_norm,
    kernel,
    load_rows,
    load_table,
    load_vector,
    mode_weights,
    oneplus,
    store_rows,
    store_table,
)


@kernel
def softmax_backward(weights, gradient):
    """The gradient of the logits."""
    return weights * (gradient - tl.sum(weights * gradient, 0))


@kernel
def content_backward(query, strength, rows, weights, gradient):
    """From content weights [K] to query [W], strength and rows [K, W]."""
    gradient = softmax_backward(weights, gradient)
    scale, norm = inverse_norm(query, 0), inverse_norm(rows, 1)
    similarity = tl.sum(rows * query[None, :], 1) * scale * norm
    of_beta = tl.where(strength > LINEAR_FROM, 1, tl.sigmoid(strength))
    to_strength = tl.sum(gradient * similarity, 0) * of_beta
    to_similarity = gradient * oneplus(strength)
    across, along = to_similarity * scale * norm, to_similarity * similarity
    to_query = tl.sum(across[:, None] * rows, 0) - tl.sum(along, 0) * scale * scale * query
    to_rows = across[:, None] * query[None, :] - (along * norm * norm)[:, None] * rows
    return to_query, to_strength, to_rows


@kernel
def mix_backward(
    first, second, third, before, content, after, to_before, to_content, to_after
):  # fmt: skip
    """From the weights pi1 b, pi2 c and pi3 f to the logits of pi."""
    to_first, to_second = tl.sum(to_before * before, 0), tl.sum(to_content * content, 0)
    to_third = tl.sum(to_after * after, 0)
    mean = first * to_first + second * to_second + third * to_third
    return first * (to_first - mean), second * (to_second - mean), third * (to_third - mean)


@kernel
def weigh_backward(
    rows, weights, to_read, to_weights,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """From a sum of rows times weights, and what comes to the weights from elsewhere: rows,
    gradient of their weights, gradient of the rows.
    """
    row = load_table(rows, K, WIDTH, NEIGHBOURS, COLUMNS)
    gradient = load_vector(to_weights, K, NEIGHBOURS) + tl.sum(row * to_read[None, :], 1)
    weight = load_vector(weights, K, NEIGHBOURS)
    return row, gradient, weight[:, None] * to_read[None, :]


@kernel
def linked_backward(
    rows, weights, to_read, to_weights, to_rows, links, last, support,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr,
    SUPPORT: tl.constexpr,
):  # fmt: skip
    """Of K linked rows: their weights before pi, the gradient of those times pi, the links; the
    gradient of the rows is stored.
    """
    _, gradient, to_row = weigh_backward(
        rows, weights, to_read, to_weights, WIDTH, COLUMNS, K, NEIGHBOURS
    )
    store_table(to_rows, to_row, K, WIDTH, NEIGHBOURS, COLUMNS)
    link = load_table(links, K, support, NEIGHBOURS, SUPPORT)
    return tl.sum(link * last[None, :], 1), gradient, link


@kernel(
    do_not_specialize=["support", "stride"],
    do_not_specialize_on_alignment=[
        "values", "last_weights", "rows", "weights", "to_reads", "to_weights", "to_values",
        "to_last",
    ],
)  # fmt: skip
def read_backward_kernel(
    values, last_weights, links, rows, weights, to_reads, to_weights, to_rows, to_values, to_last,
    support, stride,
    HEADS: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, NEIGHBOURS: tl.constexpr, SUPPORT: tl.constexpr, LINKED: tl.constexpr,
):  # fmt: skip
    """From reads [B, H * W], in rows of `stride`, and read weights [B, H, R] to rows [B, H, R, W],
    to query, strength and modes in values [B, H, I], and to last read weights [B, H, S]; grid
    (B * H,).
    """
    at = tl.program_id(0).to(tl.int64)
    R: tl.constexpr = 3 * K if LINKED else K
    FIRST: tl.constexpr = K if LINKED else 0
    values += at * INPUTS
    to_values += at * INPUTS
    rows += at * R * WIDTH
    to_rows += at * R * WIDTH
    weights += at * R
    to_weights += at * R
    query, strength = load_vector(values, WIDTH, COLUMNS), tl.load(values + 2 * WIDTH)
    to_read = load_vector(
        to_reads + at // HEADS * stride + at % HEADS * WIDTH, WIDTH, COLUMNS
    )  # fmt: skip
    row, gradient, to_row = weigh_backward(
        rows + FIRST * WIDTH, weights + FIRST, to_read, to_weights + FIRST, WIDTH, COLUMNS, K,
        NEIGHBOURS,
    )  # fmt: skip
    to_last_weights = tl.zeros([SUPPORT], values.dtype.element_ty)
    if LINKED:
        content = content_weights(query, strength, row, K, NEIGHBOURS)
        last = load_vector(last_weights + at * support, support, SUPPORT)
        of = links + at * 2 * K * support
        before, to_before, link_before = linked_backward(
            rows, weights, to_read, to_weights, to_rows, of, last, support, WIDTH, COLUMNS, K,
            NEIGHBOURS, SUPPORT,
        )  # fmt: skip
        after, to_after, link_after = linked_backward(
            rows + 2 * K * WIDTH, weights + 2 * K, to_read, to_weights + 2 * K,
            to_rows + 2 * K * WIDTH, of + K * support, last, support, WIDTH, COLUMNS, K,
            NEIGHBOURS, SUPPORT,
        )  # fmt: skip
        first, second, third = mode_weights(values + 2 * WIDTH + 3)
        to_first, to_second, to_third = mix_backward(
            first, second, third, before, content, after, to_before, gradient, to_after
        )
        tl.store(to_values + 2 * WIDTH + 3, to_first)
        tl.store(to_values + 2 * WIDTH + 4, to_second)
        tl.store(to_values + 2 * WIDTH + 5, to_third)
        to_last_weights = tl.sum((to_before * first)[:, None] * link_before, 0)
        to_last_weights += tl.sum((to_after * third)[:, None] * link_after, 0)
        gradient *= second
    else:
        content = load_vector(weights, K, NEIGHBOURS)
    to_query, to_strength, by_content = content_backward(query, strength, row, content, gradient)
    column, entry = tl.arange(0, COLUMNS), tl.arange(0, SUPPORT)
    tl.store(to_values + column, to_query, mask=column < WIDTH)
    tl.store(to_values + 2 * WIDTH, to_strength)
    tl.store(to_last + at * support + entry, to_last_weights, mask=entry < support)
    store_table(
        to_rows + FIRST * WIDTH, to_row + by_content, K, WIDTH, NEIGHBOURS, COLUMNS
    )  # fmt: skip


@kernel
def add_rows(
    buffer, ids, to_rows,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    NEIGHBOURS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Add the gradients of all that was read, K rows after K rows; no K have one twice."""
    entry = tl.arange(0, NEIGHBOURS)
    for group in range(0, HEADS * GROUPS):
        id = load_vector(ids + group * K, K, NEIGHBOURS)
        gradient = load_table(to_rows + group * K * WIDTH, K, WIDTH, NEIGHBOURS, COLUMNS)
        row = load_rows(buffer, id, entry < K, WIDTH, COLUMNS)
        tl.debug_barrier()  # several threads may have loaded what one stores
        store_rows(buffer, id, entry < K, row + gradient, WIDTH, COLUMNS)
        tl.debug_barrier()  # the next ones may be the same rows


@kernel
def write_backward(
    buffer, values, ids, last_weights, to_values, to_last, support,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """From the rows' gradient to one head's word, gates and last read weights."""
    gate = tl.sigmoid(tl.load(values + 2 * WIDTH + 1))
    interpolation = tl.sigmoid(tl.load(values + 2 * WIDTH + 2))
    word = load_vector(values + WIDTH, WIDTH, COLUMNS)
    to_word = tl.zeros([COLUMNS], values.dtype.element_ty)
    to_gate = tl.zeros([BLOCK], values.dtype.element_ty)
    to_interpolation = tl.zeros([BLOCK], values.dtype.element_ty)
    for begin in range(0, support + 1, BLOCK):
        entry = begin + tl.arange(0, BLOCK)
        is_last, is_fresh = entry < support, entry == support
        id = tl.load(ids + entry, mask=entry <= support, other=0)
        row = load_rows(buffer, id, entry <= support, WIDTH, COLUMNS)
        to_weight = tl.sum(row * word[None, :], 1)
        last = tl.load(last_weights + entry, mask=is_last, other=0)
        share = tl.where(is_fresh, 1 - interpolation, last * interpolation)
        to_gate += to_weight * share
        to_interpolation += to_weight * gate * tl.where(is_fresh, -1, last)
        to_word += tl.sum((share * gate)[:, None] * row, 0)
        linked = tl.load(to_last + entry, mask=is_last, other=0)
        tl.debug_barrier()  # several threads may have loaded what one stores
        tl.store(to_last + entry, linked + to_weight * gate * interpolation, mask=is_last)
    column = tl.arange(0, COLUMNS)
    tl.store(to_values + WIDTH + column, to_word, mask=column < WIDTH)
    tl.store(to_values + 2 * WIDTH + 1, tl.sum(to_gate, 0) * gate * (1 - gate))
    slope = interpolation * (1 - interpolation)
    tl.store(to_values + 2 * WIDTH + 2, tl.sum(to_interpolation, 0) * slope)


@kernel
def piece_by_piece(
    buffer, values, write_ids, last_weights, ids, to_rows, to_values, to_last, support,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Reads, then writes of an element that is too large to be held at once."""
    add_rows(buffer, ids, to_rows, HEADS, WIDTH, COLUMNS, K, NEIGHBOURS, GROUPS)
    written = support + 1
    for head in range(0, HEADS):
        write_backward(
            buffer, values + head * INPUTS, write_ids + head * written,
            last_weights + head * support, to_values + head * INPUTS, to_last + head * support,
            support, WIDTH, COLUMNS, BLOCK,
        )  # fmt: skip
    tl.debug_barrier()  # all heads have seen the erased rows
    head = tl.arange(0, HEAD_SIZE)
    fresh = tl.load(write_ids + head * written + support, mask=head < HEADS, other=0)
    nothing = tl.zeros([HEAD_SIZE, COLUMNS], buffer.dtype.element_ty)
    store_rows(buffer, fresh, head < HEADS, nothing, WIDTH, COLUMNS)


@kernel
def at_once(
    buffer, values, write_ids, last_weights, ids, to_rows, to_values, to_last, support,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SUPPORT: tl.constexpr, READS: tl.constexpr, READ_SIZE: tl.constexpr,
):  # fmt: skip
    """All of an element: a read row's gradient is stored by the first entry of the row, with what
    the others add to it; written rows add the same up for themselves.
    """
    head, entry, column = tl.arange(0, HEAD_SIZE), tl.arange(0, SUPPORT), tl.arange(0, COLUMNS)
    at, is_head, written = tl.arange(0, READ_SIZE), head < HEADS, support + 1
    is_last = is_head[:, None] & (entry < support)[None, :]
    is_fresh = is_head[:, None] & (entry == support)[None, :]
    place = head[:, None] * written + entry[None, :]
    id = tl.load(write_ids + place, mask=is_last | is_fresh, other=-1)
    fresh = tl.load(write_ids + head * written + support, mask=is_head, other=-1)
    read_id = tl.load(ids + at, mask=at < READS, other=-2)
    inside = (is_last | is_fresh)[:, :, None] & (column < WIDTH)[None, None, :]
    place = id[:, :, None] * WIDTH + column[None, None, :]
    row = tl.load(buffer + place, mask=inside, other=0)
    read = load_rows(buffer, read_id, at < READS, WIDTH, COLUMNS)
    place = head[:, None] * support + entry[None, :]
    last = tl.load(last_weights + place, mask=is_last, other=0)
    linked = tl.load(to_last + place, mask=is_last, other=0)
    earlier = tl.zeros([READ_SIZE], tl.int32)
    for i in tl.static_range(READS):
        one, gradient = tl.load(ids + i), load_vector(to_rows + i * WIDTH, WIDTH, COLUMNS)
        row += tl.where((id == one)[:, :, None], gradient[None, None, :], 0)
        read += tl.where((read_id == one)[:, None], gradient[None, :], 0)
        earlier = tl.maximum(earlier, ((read_id == one) & (at > i)).to(tl.int32))
    erased = tl.max((read_id[:, None] == fresh[None, :]).to(tl.int32), 1)
    read = tl.where((erased > 0)[:, None], 0, read)
    tl.debug_barrier()  # several threads may have loaded what one stores
    store_rows(buffer, read_id, (at < READS) & (earlier == 0), read, WIDTH, COLUMNS)
    nothing = tl.zeros([HEAD_SIZE, COLUMNS], buffer.dtype.element_ty)
    store_rows(buffer, fresh, is_head, nothing, WIDTH, COLUMNS)
    values += head * INPUTS
    to_values += head * INPUTS + 2 * WIDTH
    gate = tl.sigmoid(tl.load(values + 2 * WIDTH + 1, mask=is_head, other=0))
    interpolation = tl.sigmoid(tl.load(values + 2 * WIDTH + 2, mask=is_head, other=0))
    inside = is_head[:, None] & (column < WIDTH)[None, :]
    word = tl.load(values[:, None] + WIDTH + column[None, :], mask=inside, other=0)
    share = tl.where(is_fresh, 1 - interpolation[:, None], last * interpolation[:, None])
    to_weight = tl.sum(row * word[:, None, :], 2)
    to_word = tl.sum((share * gate[:, None])[:, :, None] * row, 1)
    to_gate = tl.sum(to_weight * share, 1) * gate * (1 - gate)
    to_interpolation = tl.sum(to_weight * gate[:, None] * tl.where(is_fresh, -1, last), 1)
    to_interpolation *= interpolation * (1 - interpolation)
    linked += to_weight * (gate * interpolation)[:, None]
    tl.store(to_last + place, linked, mask=is_last)
    tl.store(to_values[:, None] - WIDTH + column[None, :], to_word, mask=inside)
    tl.store(to_values + 1, to_gate, mask=is_head)
    tl.store(to_values + 2, to_interpolation, mask=is_head)


@kernel(
    do_not_specialize=["support", "capacity"],
    do_not_specialize_on_alignment=[
        "values", "write_ids", "last_weights", "ids", "to_values", "to_last",
    ],
)  # fmt: skip
def write_backward_kernel(
    buffer, values, write_ids, last_weights, ids, to_rows, to_values, to_last, support, capacity,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, INPUTS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, SUPPORT: tl.constexpr, K: tl.constexpr, NEIGHBOURS: tl.constexpr,
    GROUPS: tl.constexpr, READ_SIZE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the gradients of the rows that were read to the buffer [B, C, W]; out of it to words and
    gates in values [B, H, I], and added to last read weights [B, H, S]. At erased rows the gradient
    ends. Grid (B,).
    """
    b = tl.program_id(0).to(tl.int64)
    buffer += b * capacity * WIDTH
    reads = b * HEADS * GROUPS * K
    write_ids += b * HEADS * (support + 1)
    values += b * HEADS * INPUTS
    to_values += b * HEADS * INPUTS
    last_weights += b * HEADS * support
    to_last += b * HEADS * support
    if WHOLE:
        at_once(
            buffer, values, write_ids, last_weights, ids + reads, to_rows + reads * WIDTH,
            to_values, to_last, support, HEADS, HEAD_SIZE, INPUTS, WIDTH, COLUMNS, SUPPORT,
            HEADS * GROUPS * K, READ_SIZE,
        )  # fmt: skip
    else:
        piece_by_piece(
            buffer, values, write_ids, last_weights, ids + reads, to_rows + reads * WIDTH,
            to_values, to_last, support, HEADS, HEAD_SIZE, INPUTS, WIDTH, COLUMNS, K, NEIGHBOURS,
            GROUPS, BLOCK,
        )  # fmt: skip
