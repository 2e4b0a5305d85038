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
NAMES = {torch.float32: np.float32, torch.float64: np.float64}
METRICS = {Metric.cosine: 0, Metric.ip: 1, Metric.l2: 2}  # as in loops.py, which imports Numba


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
        parts = [
            self.metric.scores(some, self.take(own.clamp(min=0)))
            for some, own in zip(torch.split(queries, step), torch.split(ids, step), strict=True)
        ]
        return torch.cat(parts).nan_to_num(self.metric.missing, torch.inf, -torch.inf)

    def each(self, query: Float[Tensor, " W"], rows: Float[Tensor, "n W"]) -> Float[Tensor, " n"]:
        """Scores of rows for one query."""
        scores = self.metric.scores(query, rows)
        return scores.nan_to_num(self.metric.missing, torch.inf, -torch.inf)

    def top(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"], k: int) -> Found:
        """The k best of each query's own rows, as `best_of` has them."""
        return best_of(self.own(queries, ids), ids, k, self.metric)


class TableScoring(Scoring):
    """Of a table's rows, by compiled loops where they lie here."""

    def __init__(self, table: RowTable, metric: Metric) -> None:
        super().__init__(table.take, metric)
        self.table = table

    def own(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"]) -> Float[Tensor, "Q C"]:
        """As `Scoring.own`, of rows where they lie."""
        rows = self.table.rows
        loops = loops_for(rows)
        if loops is None:
            return super().own(queries, ids)
        if self._lies_open(rows):
            return self._scored(loops, queries, rows, ids)
        step = max(1, SCORED_NUMBERS // max(1, ids.shape[1] * queries.shape[1]))
        pairs = zip(torch.split(queries, step), torch.split(ids, step), strict=True)
        return torch.cat([self._copied(loops, some, own) for some, own in pairs])

    def top(self, queries: Float[Tensor, "Q W"], ids: Int[Tensor, "Q C"], k: int) -> Found:
        """As `Scoring.top`."""
        rows = self.table.rows
        loops = loops_for(rows)
        if loops is None or not self._lies_open(rows):
            return super().top(queries, ids, k)
        scores = np.full((len(ids), k), self.metric.missing, NAMES[queries.dtype])
        best = np.full(scores.shape, MISSING)
        given = [part.contiguous().numpy() for part in (queries, rows, ids)]
        kind = (METRICS[self.metric], self.metric.sign, self.metric.missing)
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

    def _copied(self, loops: ModuleType, queries: Tensor, ids: Tensor) -> Tensor:
        """Of copies in the computing dtype."""
        places = torch.arange(ids.numel()).view(ids.shape).masked_fill(ids < 0, MISSING)
        return self._scored(loops, queries, self.take(ids.flatten().clamp(min=0)), places)

    def _scored(self, loops: ModuleType, queries: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        scores = queries.new_empty(ids.shape)
        given = [part.contiguous().numpy() for part in (queries, rows, ids)]
        loops.score(METRICS[self.metric], *given, self.metric.missing, scores.numpy())
        return scores
