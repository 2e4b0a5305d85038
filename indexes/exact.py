"""Exact search: a scan of all live rows, in chunks, on any device."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.base import MISSING, Found, Index, best_of
from sparsemem.indexes.metrics import Metric, inverse_norm

CHUNK = 16_384  # rows scanned at once
SPARE = (
    8  # more than k are kept of a chunk: the scan's scores differ from the rows' own by rounding
)


class ExactIndex(Index):
    """Scans every live row: O(N) a search, nothing to maintain."""

    def _search(self, queries: Tensor, k: int) -> Found:
        return scan(self, queries, k)

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Nothing to do: a scan sees the rows as they are."""

    def removed(self, ids: Int[Tensor, " n"]) -> None:
        """Nothing to do: a scan sees the marks as they are."""

    def rebuild(self) -> None:
        """Nothing to do."""


def scan(index: Index, queries: Tensor, k: int) -> Found:
    """The k best live rows among all, by a chunked matrix product and a second look.

    SKELETON: ties at the edge of a chunk's k + SPARE are to be made exact.
    """
    table, metric = index.table, index.metric
    parts_s, parts_i = [], []
    for start in range(0, table.extent, CHUNK):
        stop = min(start + CHUNK, table.extent)
        rows = table.rows[start:stop].to(table.dtype)
        scores = product_scores(metric, queries, rows)
        scores = scores.masked_fill(~table.live[start:stop], metric.missing)
        top = scores.topk(min(k + SPARE, stop - start), 1, largest=metric.sign > 0)
        parts_s.append(top.values)
        parts_i.append(torch.where(top.values == metric.missing, MISSING, top.indices + start))
    if not parts_i:
        ids = queries.new_full((len(queries), 0), MISSING, dtype=torch.int64)
        return best_of(queries.new_empty(ids.shape), ids, k, metric)
    ids = torch.cat(parts_i, 1)
    own = metric.scores(queries, table.take(ids.clamp(min=0)))
    return best_of(own, ids, k, metric)


def product_scores(
    metric: Metric, queries: Float[Tensor, "Q W"], rows: Float[Tensor, "C W"]
) -> Float[Tensor, "Q C"]:
    """All scores as one matrix product; differ from `Metric.scores` by rounding."""
    product = queries @ rows.mT
    if metric is Metric.ip:
        return product
    if metric is Metric.cosine:
        return product * inverse_norm(rows) * inverse_norm(queries).unsqueeze(1)
    squares = rows.square().sum(-1) + queries.square().sum(-1, keepdim=True)
    return squares - 2 * product
