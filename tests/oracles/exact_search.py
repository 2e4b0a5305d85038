"""What an exact search has to find: a plain sort of the rows' own scores in float64."""

import torch

from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

FLOAT32 = 2e-6  # what a float32 score may err by, as a share of the greatest


def table_of(rows: torch.Tensor, device, live: torch.Tensor | None = None) -> RowTable:
    live = torch.ones(len(rows), dtype=torch.bool) if live is None else live
    return RowTable(rows.to(device), live.to(device))


def search(table: RowTable, metric: Metric, queries: torch.Tensor, k: int):
    """What the index finds."""
    return ExactIndex(table, metric).search(queries.to(table.rows.device), k)


def worths(table: RowTable, metric: Metric, queries: torch.Tensor) -> torch.Tensor:
    """Of every row for every query, in float64; -inf for what is not live."""
    rows, queries = table.rows.double(), queries.to(table.rows.device).double()
    own = torch.stack([metric.scores(query, rows) for query in queries]) * metric.sign
    return own.masked_fill(~table.live, -torch.inf)


def agrees(table: RowTable, metric: Metric, queries: torch.Tensor, k: int) -> None:
    """As good as the k best, each with its own score, best first, ties by id; -1 beyond."""
    scores, ids = search(table, metric, queries, k)
    own = worths(table, metric, queries)
    count = min(k, int(table.live.sum()))
    best = own.topk(count).values
    slack = FLOAT32 * own[own.isfinite()].abs().max()
    assert (ids[:, count:] == -1).all()
    assert (scores[:, count:] == metric.missing).all()
    scores, ids = scores[:, :count] * metric.sign, ids[:, :count]
    assert (ids >= 0).all()
    assert all(len(set(row)) == count for row in ids.tolist())
    torch.testing.assert_close(own.gather(1, ids), best, rtol=0, atol=slack)
    torch.testing.assert_close(scores.double(), own.gather(1, ids), rtol=0, atol=slack)
    better, equal = scores[:, :-1] > scores[:, 1:], scores[:, :-1] == scores[:, 1:]
    assert (better | (equal & (ids[:, :-1] < ids[:, 1:]))).all()
