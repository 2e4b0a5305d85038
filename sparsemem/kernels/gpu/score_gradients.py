# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Gradients through the scores of rows that were read, on a GPU: one launch.

A program for each query, which goes through its K rows in order: nothing is added up by several.
The equations are those of `Metric.gradients`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.launching import launch
from sparsemem.indexes.metrics import Metric
from sparsemem.kernels.gpu.equations import inverse_norm, kernel


@kernel
def _score_gradients(
    queries, rows, scores, ids, by_score, by_row, of_queries, of_rows, width, K,
    METRIC: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own = tl.load(queries + query * width + columns, mask=inside, other=0.0)
    factor = inverse_norm(own, 0)
    total = tl.zeros([BLOCK], tl.float32)
    shrink = tl.sum(total, 0)
    for place in range(0, K):
        at = query * K + place
        found = tl.load(ids + at) >= 0  # the score of no row is constant, and infinite
        by = tl.load(by_score + at, mask=found, other=0.0)
        row = tl.load(rows + at * width + columns, mask=inside, other=0.0)
        if METRIC == "cosine":
            row_factor = inverse_norm(row, 0)
            across = by * factor * row_factor
            along = by * tl.load(scores + at, mask=found, other=0.0)
            shrink += along
            total += across * row
            of_row = across * own - along * row_factor * row_factor * row
        elif METRIC == "ip":
            total += by * row
            of_row = by * own
        else:
            of_row = 2.0 * by * (row - own)
            total -= of_row
        if HAS_ROWS:
            of_row += tl.load(by_row + at * width + columns, mask=inside, other=0.0)
        tl.store(of_rows + at * width + columns, of_row, mask=inside)
    if METRIC == "cosine":
        total -= shrink * factor * factor * own
    tl.store(of_queries + query * width + columns, total, mask=inside)


def score_gradients(
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    rows: Float[Tensor, "Q K W"],
    scores: Float[Tensor, "Q K"],
    ids: Int[Tensor, "Q K"],
    by_score: Float[Tensor, "Q K"],
    by_row: Float[Tensor, "Q K W"] | None,
) -> tuple[Float[Tensor, "Q W"], Float[Tensor, "Q K W"]]:
    """Those of queries and rows, from those of scores (where the id is -1: none) and of rows."""
    of_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    of_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
    (count, k, width), given = rows.shape, (queries, rows, scores, ids, by_score)
    if count:
        block = triton.next_power_of_2(width)
        with torch.cuda.device_of(rows):
            launch(
                _score_gradients, (count,),
                *(part.contiguous() for part in given),
                by_score if by_row is None else by_row.contiguous(),
                of_queries, of_rows, width, k,
                METRIC=str(metric), HAS_ROWS=by_row is not None, BLOCK=block,
                num_warps=min(8, max(1, block // 256)),
            )  # fmt: skip
    return of_queries, of_rows
