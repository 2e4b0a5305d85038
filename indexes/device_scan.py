"""Exact search of rows on a GPU: one pass over them in place, no [Q, N] matrix, no copy.

1. `scan_tiles` multiplies tiles of rows with all queries and keeps the best score of each tile.
2. `merge` finds the k + SPARE best tiles of each query: they hold its k best rows, with tiles to
   spare for what step 1 has rounded.
3. `score_tiles` scores the rows of those tiles again, each by itself, as `Metric.scores` does.
4. `merge` finds the k best rows, by score and then id.

What must move through the GPU's memory is N W itemsize + N bytes (rows and marks), and beside
4 Q N / ROWS bytes (the best of each tile, written; little of it is read). So the limit of a search
of 10^6 rows of 64 float32 numbers is 86 us at 3 TB/s, and 4.3 ms for 10^8 in bfloat16.

*Accuracy of step 1.* A product's worth errs by (W + 16) 2^-22 |q||m| at most, no more than twice
what a float32 sum of W products may. Float32 numbers are split into the 11 leading bits, which
tensor cores take exactly (tf32), and a rest that loses what is under 2^-21 of the number; of the
four products of parts the one of both rests, under 2^-20 |q||m|, is left out. Rows in bfloat16 and
float16 are exact factors: their queries are split into three parts of 8 bits, which hold a
float32; or, after scaling by a power of two, into two of 11 bits and float16's smallest steps,
2^-25 of the largest number. Products of parts are exact in float32, in which they are summed. For
l2, where |m|^2 - 2 q.m would cancel far from the origin, rows and queries are moved by a number
in the middle of the queries. Where more than SPARE tiles beyond k hold rows whose scores differ
from the k-th best by less than this error, but are not equal, rows as good as the k best within
that error may be returned for them. Rows that are equal score the same in step 1, so ties go to
the lowest ids however many there are.

A row whose score is not a number ranks last, and a search waits for nothing on the host.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.indexes.base import Found
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

SPARE = 8  # tiles beyond k whose rows are scored themselves
MOST_QUERIES = 128  # that one pass over the rows serves
MOST_K = 128
MOST_WIDTH = 512
MOST_ROWS = 2**31 - 2**20  # row numbers, and those a program looks ahead to, are 32 bits wide
MOST_MEMBERS = 1024  # of a list that are looked through at once
AHEAD = 32  # tiles whose best are looked through at once
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Shape(NamedTuple):
    """How a scan is cut into programs of the GPU: see benchmarks/gpu_scan_tuning.py."""

    rows: int  # of a tile
    part: int  # columns multiplied at once
    warps: int
    stages: int  # tiles that are on their way from memory, and one
    programs: int  # for each multiprocessor
    registers: int | None = None  # of a thread, at most


def shape_of(width: int, dtype: torch.dtype, queries: int) -> Shape:
    """The shape for rows [N, width] of a dtype and a padded number of queries.

    Chosen so that what a multiprocessor has (65,536 registers, 227 KiB) takes all its programs.
    """
    columns = max(16, power_of_two(width))
    programs = 3 if queries <= 64 else 2
    if dtype == torch.float32:
        part = columns if columns <= 64 else 32
        return Shape(64, part, 4, 3, programs, 168 if queries <= 64 else None)
    return Shape(128, min(columns, 64), 4, 3, programs)


def power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()


def fits(table: RowTable, k: int) -> bool:
    """Whether the kernels can search a table for k rows."""
    rows = getattr(table, "rows", None)  # a table's rows may be computed
    return (
        isinstance(rows, Tensor)
        and rows.dtype in DTYPES
        and rows.stride(1) == 1
        and table.live.is_contiguous()
        and 0 < table.width <= MOST_WIDTH
        and table.num_rows <= MOST_ROWS
        and k <= MOST_K
    )


def device_scan(
    table: RowTable,
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    k: int,
    shape: Shape | None = None,
) -> Found:
    """The k best of all live rows: by score, then id. Queries are float32; `fits(table, k)`."""
    scores = queries.new_empty(len(queries), k)
    ids = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
    found = Found(scores, ids)
    if not table.extent:
        return Found(scores.fill_(metric.missing), ids.fill_(-1))
    with torch.cuda.device_of(table.rows):  # type: ignore[no-untyped-call]
        for start in range(0, len(queries), MOST_QUERIES):
            stop = start + MOST_QUERIES
            part = Found(scores[start:stop], ids[start:stop])
            fill(part, table, metric, queries[start:stop].contiguous(), shape)
    return found


def fill(
    found: Found,
    table: RowTable,
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    shape: Shape | None,
) -> None:
    """Search for at most MOST_QUERIES queries, and write what is found into `found`."""
    wanted = found.ids.shape[1] + SPARE
    padded = max(16, power_of_two(len(queries)))
    shape = shape or shape_of(table.width, table.rows.dtype, padded)
    best, heads = scan_tiles(table, metric, queries, padded, shape)
    tiles = merge_tiles(best, heads, len(queries), wanted)
    keys, greatest = score_tiles(table, metric, queries, tiles, shape)
    merge_rows(keys, greatest, found, metric)


def scan_tiles(
    table: RowTable, metric: Metric, queries: Float[Tensor, "Q W"], padded: int, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Step 1: the best worth of each tile [T, padded], and the best key of each program's tiles."""
    from sparsemem.indexes import scan_kernels

    tiles = -(-table.extent // shape.rows)
    programs = min(tiles, shape.programs * multiprocessors(queries.device))
    best = torch.empty(tiles, padded, device=queries.device)
    heads = torch.empty(padded, programs, dtype=torch.int64, device=queries.device)
    center = middle(queries) if metric is Metric.l2 else queries
    scan_kernels.scan_tiles[(programs,)](
        table.rows, marks(table), queries, center, best, heads,
        len(queries), table.extent, tiles, programs,
        STRIDE=table.rows.stride(0), WIDTH=table.width,
        PART=shape.part, PARTS=-(-table.width // shape.part),
        ROWS=shape.rows, QUERIES=padded, STAGES=shape.stages, AHEAD=AHEAD,
        METRIC=str(metric), PRODUCT=DTYPES[table.rows.dtype],
        TURNED=table.rows.dtype != torch.float32 and padded >= 64,
        num_warps=shape.warps, maxnreg=shape.registers,
    )  # fmt: skip
    return best, heads


def merge_tiles(best: Tensor, heads: Tensor, count: int, wanted: int) -> Tensor:
    """Step 2: the numbers of the `wanted` best tiles of each query [Q, C], -1 for none."""
    (tiles, padded), programs = best.shape, heads.shape[1]
    chosen = heads.new_empty(count, wanted)
    strides = 1, padded, programs * padded
    merge(best, heads[:count], chosen, best, tiles, -(-tiles // programs), strides, False, 1)
    return chosen


def score_tiles(
    table: RowTable, metric: Metric, queries: Float[Tensor, "Q W"], tiles: Tensor, shape: Shape
) -> tuple[Tensor, Tensor]:
    """Step 3: the keys of the rows of each query's tiles [Q, C, ROWS], and the best of each."""
    from sparsemem.indexes import scan_kernels

    keys = tiles.new_empty(*tiles.shape, shape.rows)
    greatest = torch.empty_like(tiles)
    scan_kernels.score_tiles[tuple(tiles.shape)](
        table.rows, marks(table), queries, tiles, keys, greatest, table.extent, tiles.shape[1],
        STRIDE=table.rows.stride(0), WIDTH=table.width,
        PART=shape.part, PARTS=-(-table.width // shape.part), ROWS=shape.rows, METRIC=str(metric),
    )  # fmt: skip
    return keys, greatest


def merge_rows(keys: Tensor, greatest: Tensor, found: Found, metric: Metric) -> None:
    """Step 4: the best of the rows scored in step 3."""
    _, tiles, rows = keys.shape
    strides = tiles * rows, rows, 1
    merge(keys, greatest, found.ids, found.scores, rows, rows, strides, True, metric.sign)


def merge(
    lists: Tensor,
    heads: Tensor,
    numbers: Tensor,
    scores: Tensor,
    length: int,
    members: int,
    strides: tuple[int, int, int],
    keyed: bool,
    sign: int,
) -> None:
    """The best of lists of `members` each, given the heads [Q, L] of the lists: see the kernels."""
    from sparsemem.indexes import scan_kernels

    (queries, count), wanted = heads.shape, numbers.shape[1]
    given = lists, heads, numbers, scores, count, length, members, wanted, *strides
    places = min(max(64, power_of_two(members)), MOST_MEMBERS)
    scan_kernels.merge[(queries,)](
        *given, LISTS=power_of_two(count), MEMBERS=places, KEYED=keyed, SIGN=sign,
        num_warps=1 if places <= 128 else 4,
    )  # fmt: skip


def marks(table: RowTable) -> Tensor:
    """The marks of live rows as bytes, in place."""
    return table.live.view(torch.uint8)


def middle(queries: Float[Tensor, "Q W"]) -> Float[Tensor, " W"]:
    """A number among those of the queries in each column that few far ones do not move."""
    return queries.sort(0).values[len(queries) // 2]


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device works on at once; a few in the interpreter."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
