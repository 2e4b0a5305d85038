"""Gradients through the scores of rows that were read, on the CPU, by compiled code."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.metrics import Metric
from sparsemem.kernels import RowKernels


def score_gradients(
    kernels: RowKernels,
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    rows: Float[Tensor, "Q K W"],
    scores: Float[Tensor, "Q K"],
    ids: Int[Tensor, "Q K"],
    by_score: Float[Tensor, "Q K"],
    by_row: Float[Tensor, "Q K W"] | None,
) -> tuple[Float[Tensor, "Q W"], Float[Tensor, "Q K W"]]:
    """Those of queries and rows, from those of scores (where the id is -1: none) and of rows."""
    of_queries, of_rows = queries.new_empty(queries.shape), rows.new_empty(rows.shape)
    given = (ids, queries, rows, scores, by_score, by_row)
    tensors = [None if part is None else part.contiguous() for part in given]
    made = (of_queries, of_rows)
    kernels.score_gradients(
        kernels.like,
        (metric.code, *rows.shape),
        tuple([0 if part is None else part.data_ptr() for part in (*tensors, *made)]),
    )
    return of_queries, of_rows
