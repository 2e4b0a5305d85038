"""Scores of rows that were proposed: exact ones, computed from the rows themselves.

Shape letters: Q queries, C candidates of each, W width, n rows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.base import MISSING, Found, best_of
from sparsemem.indexes.compiling import loops_for
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

SCORED_NUMBERS = 2**22  # of rows that are scored at once
MOST_INSERTED = 256  # kept by insertion, which takes k steps where the best come last
NUMPY_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


class Scoring:
    """How an index scores rows: a row has the same score, to the last bit, wherever it stands.

    What is not a number, or the difference of infinities, is as bad as no row. Where an id is -1
    there is no row, and the score says nothing.

    Args:
        take: rows [n, W] by their ids, in the queries' dtype.
    """

    def __init__(self, take: Callable[[Tensor], Tensor], metric: Metric) -> None:
        self.take, self.metric = take, metric

    def own(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"]) -> Float[Tensor, "Q C"]:
        """Scores of each query's own rows, of so many at a time that memory stays bounded."""
        step = max(1, SCORED_NUMBERS // max(1, ids.shape[1] * queries.shape[1]))
        pairs = zip(torch.split(queries, step), torch.split(ids, step), strict=True)
        return torch.cat([self._copied(some, own) for some, own in pairs])

    def each(self, query: Float[Tensor, " W"], rows: Float[Tensor, "n W"]) -> Float[Tensor, " n"]:
        """Scores of rows for one query."""
        scores = self.metric.scores(query, rows)
        return scores.nan_to_num(self.metric.missing, torch.inf, -torch.inf)

    def top(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"], k: int) -> Found:
        """The k best of each query's own rows, as `best_of` has them."""
        return best_of(self.own(queries, ids), ids, k, self.metric)

    def _copied(self, queries: Tensor, ids: Tensor) -> Tensor:
        """`own`, of copies of the rows."""
        scores = self.metric.scores(queries, self.take(ids.clamp(min=0)))
        return scores.nan_to_num(self.metric.missing, torch.inf, -torch.inf)


class TableScoring(Scoring):
    """Of a table's rows, by compiled loops where they lie here."""

    def __init__(self, table: RowTable, metric: Metric) -> None:
        super().__init__(table.take, metric)
        self.table = table

    def own(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"]) -> Float[Tensor, "Q C"]:
        """As `Scoring.own`, of rows where they lie."""
        rows, loops = self.table.rows, loops_for(self.table.rows)
        if loops is None or not self._lies_open(rows):
            return super().own(queries, ids)
        return self._scored(loops, queries, rows, ids)

    def top(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"], k: int) -> Found:
        """As `Scoring.top`."""
        rows, loops = self.table.rows, loops_for(self.table.rows)
        if loops is None or not self._lies_open(rows) or k > MOST_INSERTED:
            return super().top(queries, ids, k)
        scores = np.full((len(ids), k), self.metric.missing, NUMPY_DTYPES[queries.dtype])
        best = np.full(scores.shape, MISSING)
        given = [part.detach().contiguous().numpy() for part in (queries, rows, ids)]
        kind = (self.metric.code, self.metric.sign, self.metric.missing)
        loops.top(*kind, *given, scores, best)
        return Found(torch.from_numpy(scores), torch.from_numpy(best))

    def each(self, query: Float[Tensor, " W"], rows: Float[Tensor, "n W"]) -> Float[Tensor, " n"]:
        """As `Scoring.each`."""
        loops = loops_for(rows)
        if loops is None:
            return super().each(query, rows)
        ids = torch.arange(len(rows)).unsqueeze(0)
        return self._scored(loops, query.unsqueeze(0), rows.contiguous(), ids).squeeze(0)

    def _lies_open(self, rows: Tensor) -> bool:
        """Whether loops can look at the rows where they are."""
        return rows.dtype == self.table.dtype and rows.is_contiguous()

    def _copied(self, queries: Tensor, ids: Tensor) -> Tensor:
        """As `Scoring._copied`, of copies in the computing dtype."""
        rows = self.take(ids.flatten().clamp(min=0))
        loops = loops_for(rows)
        if loops is None:
            return super()._copied(queries, ids)
        places = torch.arange(ids.numel()).view(ids.shape).masked_fill(ids < 0, MISSING)
        return self._scored(loops, queries, rows, places)

    def _scored(self, loops: ModuleType, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        scores = queries.new_empty(ids.shape)
        given = [part.detach().contiguous().numpy() for part in (queries, rows, ids)]
        loops.score(self.metric.code, *given, self.metric.missing, scores.numpy())
        return scores
