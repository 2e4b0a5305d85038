"""The contract of every index: search, update, remove, rebuild."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.checks import check_finite, check_size
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

MISSING = -1  # as an id: there are fewer than k rows


class Found(NamedTuple):
    """The rows found for each query, best first, ties by row id; id -1 where there are no more."""

    scores: Float[Tensor, "Q K"]
    ids: Int[Tensor, "Q K"]


class Index(ABC):
    """Finds rows of a table. Ids are row numbers; scores are computed from the rows themselves.

    An index is a cache derived from the table: it can lose recall, never truth. A row that was
    updated is found by the next search, and one that was removed never again.
    """

    takes_repeats = False  # `changed` may be told of rows repeatedly, and of some that are not live

    def __init__(self, table: RowTable, metric: Metric) -> None:
        self.table = table
        self.metric = metric

    def search(self, queries: Float[Tensor, "Q W"], k: int) -> Found:
        """The k best live rows of each query. Ids are -1 where fewer than k are live."""
        check_size("k", k)
        check_queries(queries, self.table.width)
        with torch.no_grad(), self.table.lock.read():
            return self._search(queries.detach().to(self.table.dtype), k)

    def update(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n W"]) -> None:
        """Write rows into the table; they are live and found from now on."""
        check_ids(ids, self.table.num_rows)
        check_rows(rows, len(ids), self.table.width)
        with torch.no_grad(), self.table.lock.write():
            self.table.put(ids, rows)
            self.changed(ids)

    def remove(self, ids: Int[Tensor, " n"]) -> None:
        """Take rows out: they are not found any more. Rows that are not live are left alone."""
        check_ids(ids, self.table.num_rows)
        with torch.no_grad(), self.table.lock.write():
            self.table.set_live(ids, False)
            self.removed(ids)

    @abstractmethod
    def _search(self, queries: Tensor, k: int) -> Found:
        """As `search`, with checked queries of the computing dtype, under the table's lock."""

    @abstractmethod
    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of rows that were changed in place, under `lock.write()`.

        They are distinct and live, unless the index `takes_repeats`.
        """

    @abstractmethod
    def removed(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of distinct rows that are no longer live, under `lock.write()`."""

    @abstractmethod
    def rebuild(self) -> None:
        """Derive the index anew from all rows, and return when it is in use."""

    def stats(self) -> dict[str, Any]:
        """Figures to watch, those of exact search here; see `FreshIndex.stats`."""
        return {
            "recall": 1.0,
            "imbalance": 1.0,
            "buffered": 0,
            "bytes": 0,
            "age": 0.0,
            "rebuilds": 0,
            "exact": True,
            "error": None,
        }

    def tell(  # noqa: B027 (most have nothing to tune)
        self, queries: Float[Tensor, "q W"], k: int, counts: Float[Tensor, " q"]
    ) -> None:
        """Be told which of the k results of searches counted: those as good as `counts` or better.

        For an index over a part of the rows, whose results are merged with those of others.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to stop)
        """Stop what runs in the background. The index can still be searched."""


def best_of(scores: Tensor, ids: Tensor, k: int, metric: Metric) -> Found:
    """The k best of candidates [Q, C], ties by id; id -1 marks no candidate.

    Fewer than k candidates are filled up with id -1.
    """
    scores = scores.masked_fill(ids < 0, metric.missing)
    if ids.shape[1] < k:
        scores = torch.nn.functional.pad(scores, (0, k - ids.shape[1]), value=metric.missing)
        ids = torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=MISSING)
    # Two stable sorts: by id, then by score.
    by_id = ids.masked_fill(ids < 0, torch.iinfo(ids.dtype).max).argsort(1)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    order = scores.argsort(dim=1, descending=metric.sign > 0, stable=True)[:, :k]
    return Found(scores.gather(1, order), ids.gather(1, order))


def check_queries(queries: Tensor, width: int) -> None:
    """Refuse queries of another shape or kind than [Q, width] finite numbers."""
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(f"queries has shape {tuple(queries.shape)}, expected [Q, {width}]")
    if not queries.dtype.is_floating_point:
        raise TypeError(f"queries is {queries.dtype}, expected a floating dtype")
    check_finite("queries", queries)


def check_ids(ids: Tensor, num_rows: int) -> None:
    """Refuse ids that are not distinct row numbers [n]."""
    if ids.dtype != torch.int64 or ids.ndim != 1:
        raise TypeError(f"ids is {ids.dtype} {list(ids.shape)}, expected int64 [n]")
    if not len(ids):
        return
    ordered = ids.sort().values
    again = ordered[1:] == ordered[:-1]
    # At once: a device has the host wait for each look.
    low, high, repeats = torch.stack([ordered[0], ordered[-1], again.sum()]).tolist()
    if low < 0 or high >= num_rows:
        raise ValueError(f"ids holds {low if low < 0 else high}, expected 0 .. {num_rows - 1}")
    if repeats:
        first = int(ordered[1:][again][0])
        raise ValueError(f"ids holds {first} more than once, expected distinct rows")


def check_rows(rows: Tensor, count: int, width: int) -> None:
    """Refuse rows of another shape or kind than [count, width] finite numbers."""
    if tuple(rows.shape) != (count, width):
        raise ValueError(f"rows has shape {tuple(rows.shape)}, expected [{count}, {width}]")
    if not rows.dtype.is_floating_point:
        raise TypeError(f"rows is {rows.dtype}, expected a floating dtype")
    check_finite("rows", rows)
