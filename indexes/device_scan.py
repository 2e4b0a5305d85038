"""Exact search of rows on a GPU: one pass over them in place, no [Q, N] matrix, no copy.

1. `scan_tiles` multiplies tiles of rows with all queries and keeps, of each tile, a bound that no
   row's score exceeds: the best product and what it may err by.
2. `find_rows` scores the rows of the tiles with the best bounds themselves, each as
   `Metric.scores` does, and stops when no bound left reaches the k-th best score found.

So products need not be accurate for the result to be exact: rough ones cost more tiles. Beyond
ROUGH_ROWS rows products are rough. A query for which ROUGH_TILES tiles beyond k do not suffice is
searched again with fine products, by two launches that end at once where there are none such. Only
where (k + FINE_TILES) / SEVERAL tiles hold rows whose bounds reach the k-th best, rows as good as
the k best within the error of a fine product may be returned for them. Rows that are equal have
equal bounds, so even then ties go to the lowest ids.

What must move through the GPU's memory is N W itemsize + N bytes (rows and marks), and beside 4 Q N
/ ROWS bytes (the bounds, written; little of them is read). So the limit of a search of 10^6 rows of
64 float32 numbers is 86 us at 3 TB/s, and 4.3 ms for 10^8 in bfloat16. A rough pass needs 2 Q N W
operations, in tf32 or bfloat16: 82 10^9 for 10^7 rows of 64 and 64 queries, or 0.2 ms at 400
TFLOP/s; the rows take 0.6 ms in float32, and 0.3 ms in bfloat16, at 4.2 TB/s.

*Errors*, as shares of |q||m|. A rough product rounds queries to bfloat16, 2^-8, or float16, 2^-11
(scaled by a power of two; its smallest steps add 2^-25 of the largest number), where rows are exact
factors. Of float32 rows and their queries it takes the 11 leading bits, as tensor cores do (tf32):
2^-10 of each. A fine one takes float32 in two parts: those bits, exactly, and a rest that loses
what is under 2^-21; of the four products of parts the one of both rests, under 2^-20, is left out.
Or queries in three parts of 8 bits or two of 11, for rows that are exact factors. Sums, in float32
here and in step 2, err by (W + 16) 2^-21 at most, with all that follows them. For cosine the share
is the error; for ip the length of each row counts. For l2, |m|^2 - 2 q.m would cancel far from the
origin, so rows and queries are moved by a number in the middle of the queries; there |q||m| <=
(|q|^2 + |m|^2) / 2. How many rows have a score within the error: of 10^7 random ones of 64 numbers,
about 6 beyond the 8 best lie within 2^-7 by cosine, and one within 2^-9, since their number grows
by exp(69 x) over a distance of x.

A row whose score is not a number ranks last, and a search waits for nothing on the host.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemem.indexes.base import Found
from sparsemem.indexes.launching import launch
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

ROUGH_ROWS = 2**19  # beyond which a rough pass, and one for what it leaves unsure, are faster
ROUGH_TILES, FINE_TILES = 64, 4096  # beyond k that are scored, in a rough pass and else
ROUGH = {"float32": 2.0**-9 + 2.0**-20, "bfloat16": 2.0**-8, "float16": 2.0**-11 + 2.0**-20}
FLOAT32_ROUGH = ("rough float32", "rough centered")  # products of rows and queries in tf32
FINE = 2.0**-19  # what splitting leaves out of a product |q||m|, and roughly
MOST_QUERIES = 128  # that one pass over the rows serves
MOST_K = 128
MOST_WIDTH = 512
MOST_ROWS = 2**31 - 2**20  # row numbers, and those a program looks ahead to, are 32 bits wide
MOST_MEMBERS = 1024  # of a list that are looked through at once
SEVERAL = 4  # tiles whose rows are scored at once
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


def shape_of(width: int, product: str, queries: int) -> Shape:
    """The shape for rows [N, width], a product of `Pass`, and a padded number of queries.

    What a multiprocessor has (65,536 registers, 227 KiB) takes all its programs. Measured with
    benchmarks/gpu_scan_tuning.py on an H200; the best shapes were within 10 %.
    """
    columns, few = max(16, power_of_two(width)), queries <= 64
    if product == "float32":
        part = columns if columns <= 64 else 32
        return Shape(64, part, 4, 3, 3 if few else 2, 168 if few and part == columns else None)
    if product in FLOAT32_ROUGH:
        part = columns if columns <= 64 else 32
        tall = few or is_turned(product, width, queries)
        return Shape(128 if tall else 64, part, 4, 3, 2)
    return Shape(128, min(columns, 64), 4, 3, 3 if few else 2)


def is_turned(product: str, width: int, queries: int) -> bool:
    """Whether rows are the second factor of products, and the padded queries the first.

    The second one is taken from shared memory: float32 rows lie there, unless they are centered or
    come in parts; half numbers go there cheaply. Tensor cores take 64 rows of the first.
    """
    as_they_lie = product == "rough float32" and width <= 64
    return queries >= 64 and (as_they_lie or product not in ("float32", *FLOAT32_ROUGH))


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
    """The k best of all live rows: by score, then id. Queries are float32; `fits(table, k)`.

    The shape is that of the first pass.
    """
    scores = queries.new_empty(len(queries), k)
    ids = torch.empty(scores.shape, dtype=torch.int64, device=queries.device)
    if not table.extent:
        return Found(scores.fill_(metric.missing), ids.fill_(-1))
    with torch.cuda.device_of(table.rows):  # type: ignore[no-untyped-call]
        for start in range(0, len(queries), MOST_QUERIES):
            stop = start + MOST_QUERIES
            part = Found(scores[start:stop], ids[start:stop])
            fill(part, table, metric, queries[start:stop].contiguous(), shape)
    return Found(scores, ids)


def fill(
    found: Found,
    table: RowTable,
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    shape: Shape | None = None,
) -> None:
    """Search for at most MOST_QUERIES queries, and write what is found into `found`."""
    unsure = torch.ones(len(queries), dtype=torch.int32, device=queries.device)
    work = Work(table, metric, queries, middle(queries) if metric is Metric.l2 else queries, unsure)
    if table.extent <= ROUGH_ROWS:
        one_pass(work, found, pass_of(table, metric, rough=False), shape)
        return
    one_pass(work, found, pass_of(table, metric, rough=True), shape)
    one_pass(work, found, pass_of(table, metric, rough=False))


class Work(NamedTuple):
    """What both passes of a search share."""

    table: RowTable
    metric: Metric
    queries: Tensor  # [Q, W]
    center: Tensor  # [W]
    unsure: Tensor  # [Q], 1 for what is to be searched for, and 0 once that is done


class Pass(NamedTuple):
    """How products are made, and what that means for their accuracy."""

    product: str  # of `scan_kernels.product`
    error: float  # see above
    most: int  # tiles beyond k that are scored


def pass_of(table: RowTable, metric: Metric, *, rough: bool) -> Pass:
    """A pass over the rows of a table."""
    # Half numbers less the middle of the queries have more bits than half numbers hold.
    name = DTYPES[torch.float32 if metric is Metric.l2 else table.rows.dtype]
    split = ROUGH[name] if rough else FINE
    product = name
    if rough:
        wide = "rough centered" if metric is Metric.l2 else "rough float32"
        product = wide if name == "float32" else "rough"
    share = 0.5 if metric is Metric.l2 else 1.0
    error = share * split + (table.width + 16) * 2.0**-21
    return Pass(product, error, ROUGH_TILES if rough else FINE_TILES)


def one_pass(work: Work, found: Found, kind: Pass, shape: Shape | None = None) -> None:
    """Both steps; writes into `found` and `work.unsure`."""
    if shape is None:
        padded = max(16, power_of_two(len(work.queries)))
        shape = shape_of(work.table.width, kind.product, padded)
    best, heads = scan_tiles(work, kind, shape)
    find_rows(work, kind, shape, best, heads, found)


def scan_tiles(work: Work, kind: Pass, shape: Shape) -> tuple[Tensor, Tensor]:
    """Step 1: bounds of the worths of each tile [T, Q], and the best key of each program's tiles.

    Q is the padded number of queries.
    """
    from sparsemem.indexes import scan_kernels

    table, queries = work.table, work.queries
    padded = max(16, power_of_two(len(queries)))
    tiles = -(-table.extent // shape.rows)
    programs = min(tiles, shape.programs * multiprocessors(queries.device))
    best = torch.empty(tiles, padded, device=queries.device)
    heads = torch.empty(padded, programs, dtype=torch.int64, device=queries.device)
    launch(
        scan_kernels.scan_tiles, (programs,),
        table.rows, marks(table), queries, work.center, work.unsure, best, heads,
        len(queries), table.extent, tiles, programs,
        STRIDE=table.rows.stride(0), WIDTH=table.width,
        PART=shape.part, PARTS=-(-table.width // shape.part),
        ROWS=shape.rows, QUERIES=padded, STAGES=shape.stages, AHEAD=AHEAD,
        METRIC=str(work.metric), PRODUCT=kind.product,
        TURNED=is_turned(kind.product, table.width, padded),
        ERROR=kind.error,
        num_warps=shape.warps, maxnreg=shape.registers,
    )  # fmt: skip
    return best, heads


def find_rows(
    work: Work, kind: Pass, shape: Shape, best: Tensor, heads: Tensor, found: Found
) -> None:
    """Step 2: the best rows of the best tiles, as many as may matter."""
    from sparsemem.indexes import scan_kernels

    table, (tiles, padded) = work.table, best.shape
    (count, k), programs = found.ids.shape, heads.shape[1]
    members = -(-tiles // programs)
    launch(
        scan_kernels.find_rows, (count,),
        table.rows, marks(table), work.queries, work.center, work.unsure, best, heads, *found,
        table.extent, tiles, programs, members, k, k + kind.most,
        STRIDE=table.rows.stride(0), WIDTH=table.width,
        PART=shape.part, PARTS=-(-table.width // shape.part), ROWS=shape.rows, QUERIES=padded,
        LISTS=power_of_two(shape.programs * multiprocessors(best.device)),
        MEMBERS=min(max(64, power_of_two(members)), MOST_MEMBERS), KEPT=max(16, power_of_two(k)),
        SEVERAL=SEVERAL, METRIC=str(work.metric), SIGN=work.metric.sign,
        ERROR=kind.error, num_warps=8,
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
