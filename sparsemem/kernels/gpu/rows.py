# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Triton kernels on rows that were read: sums by row, and weighted sums without a copy of the rows.

Letters: N rows of a table, V their width, n entries, Q queries, K rows of each. A program sums
what it sums in order, and nothing is added up by several programs: results are the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.launching import launch
from sparsemem.kernels.gpu.equations import kernel

COLUMNS = 1024  # of a row that a program holds at once, at most


@kernel
def is_first(ids, place):
    """Whether the entry at `place` is the first of its row; ids are sorted."""
    before = tl.load(ids + place - 1, mask=place > 0, other=-1)
    return (place == 0) | (before != tl.load(ids + place))


@kernel
def segment_sum(ids, order, values, count, width, place, columns, inside, BLOCK: tl.constexpr):
    """The sum, in order, of all entries of the row whose first entry is at `place`."""
    row = tl.load(ids + place)
    total = tl.zeros([BLOCK], tl.float32)
    more = place < count
    while more:
        entry = tl.load(order + place).to(tl.int64)
        total += tl.load(values + entry * width + columns, mask=inside, other=0.0).to(tl.float32)
        place += 1
        # At the end row -1 would go on for ever, if one compared what lies behind with it.
        more = (place < count) & (tl.load(ids + place, mask=place < count, other=-1) == row)
    return total


@kernel(do_not_specialize=["count"])
def _sum_segments(ids, order, values, sums, count, width, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros([BLOCK], tl.float32)
    if is_first(ids, place):
        total = segment_sum(ids, order, values, count, width, place, columns, inside, BLOCK)
    tl.store(sums + place.to(tl.int64) * width + columns, total, mask=inside)


@kernel
def _weigh(table, stride, ids, weights, sums, width, K, BLOCK: tl.constexpr):
    query = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for place in range(0, K):
        row = tl.load(ids + query * K + place).to(tl.int64)
        weight = tl.load(weights + query * K + place)
        there = columns < tl.where(row >= 0, width, 0)
        total += weight * tl.load(table + row * stride + columns, there, other=0.0).to(tl.float32)
    tl.store(sums + query * width + columns, total, mask=columns < width)


@kernel
def _weights_gradient(table, stride, ids, gradient, result, width, K, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    query = place // K
    row = tl.load(ids + place).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        there = columns < tl.where(row >= 0, width, 0)
        value = tl.load(table + row * stride + columns, mask=there, other=0.0).to(tl.float32)
        total += value * tl.load(gradient + query * width + columns, mask=there, other=0.0)
    tl.store(result + place, tl.sum(total, 0))


def sum_by_row(
    ids: Int[Tensor, " n"], values: Float[Tensor, "n ..."]
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n ..."]]:
    """The entries of rows, with each row's sum in the first of them and zeros in the others.

    As `coalesce`, but for the entries of zeros, whose number nobody has to wait for. Returns the
    ids, sorted, and float32 values.
    """
    ids, order = torch.sort(ids, stable=True)
    values = values.contiguous()
    sums = torch.empty_like(values, dtype=torch.float32)
    if values.numel():
        count, width = len(values), values[0].numel()
        block = _block(width)
        with torch.cuda.device_of(values):
            grid = (count, triton.cdiv(width, block))
            launch(_sum_segments, grid, ids, order, values, sums, count, width, BLOCK=block)
    return ids, sums


def weigh_rows(
    table: Float[Tensor, "N V"], ids: Int[Tensor, "Q K"], weights: Float[Tensor, "Q K"]
) -> Float[Tensor, "Q V"]:
    """sum_k weights[q, k] table[ids[q, k]] in float32; an id of -1 counts as a row of zeros."""
    (queries, per_query), width = ids.shape, table.shape[1]
    sums = torch.zeros(queries, width, dtype=torch.float32, device=table.device)
    if ids.numel():
        block = _block(width)
        with torch.cuda.device_of(table):
            launch(
                _weigh,
                (queries, triton.cdiv(width, block)),
                table,
                table.stride(0),
                ids.contiguous(),
                weights.contiguous(),
                sums,
                width,
                per_query,
                BLOCK=block,
            )
    return sums


def weights_gradient(
    table: Float[Tensor, "N V"], ids: Int[Tensor, "Q K"], gradient: Float[Tensor, "Q V"]
) -> Float[Tensor, "Q K"]:
    """gradient[q] . table[ids[q, k]]: what `weigh_rows` gives its weights."""
    result = torch.zeros(ids.shape, dtype=torch.float32, device=table.device)
    if ids.numel():
        width = table.shape[1]
        with torch.cuda.device_of(table):
            launch(
                _weights_gradient,
                (ids.numel(),),
                table,
                table.stride(0),
                ids.contiguous(),
                gradient.contiguous(),
                result,
                width,
                ids.shape[1],
                BLOCK=_block(width),
            )
    return result


def _block(width: int) -> int:
    block: int = triton.next_power_of_2(width)
    return min(COLUMNS, block)
