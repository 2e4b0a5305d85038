"""MemoryBank: millions of rows that outlive a sequence, found by content."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparsemem.bank.book import RowBook
from sparsemem.bank.rows import gather, own, zeros
from sparsemem.indexes.base import check_ids, check_rows
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable


class Hit(NamedTuple):
    """What a read found, best first; where no more rows are live: id -1, zeros, worst score."""

    rows: Float[Tensor, "*Q K W"]
    values: Float[Tensor, "*Q K V"]
    scores: Float[Tensor, "*Q K"]
    ids: Int[Tensor, "*Q K"]


class MemoryBank(nn.Module):
    """SKELETON, to be completed (docs/architecture.md says what belongs here)."""

    keys: nn.Parameter
    values: nn.Parameter | None  # None: the keys are the values

    def __init__(
        self,
        num_rows: int,
        width: int,
        value_width: int | None = None,
        *,
        index: str = "exact",
        metric: str = "cosine",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        **index_options: Any,
    ) -> None:
        super().__init__()
        self.num_rows, self.width, self.value_width = num_rows, width, value_width
        self.metric = Metric(metric)
        self.keys = own(nn.Parameter(zeros(num_rows, width, dtype=dtype, device=device)), self)
        self.values = None
        if value_width is not None:
            table = zeros(num_rows, value_width, dtype=dtype, device=device)
            self.values = own(nn.Parameter(table), self)
        self.book = RowBook(num_rows, device)
        self.table = RowTable(self.keys.data, self.book.live)
        self.index = make_index(index, self.table, self.metric, **index_options)

    @property
    def computing_dtype(self) -> torch.dtype:
        """What scores, weights and gradients are computed in."""
        return self.table.dtype

    def read(self, queries: Float[Tensor, "*Q W"], top_k: int) -> Hit:
        """The top_k best rows of each query; differentiable in queries, rows and values."""
        flat = queries.reshape(-1, self.width).to(self.computing_dtype)
        with self.table.lock.read():
            ids = self.index.search(flat, top_k).ids
            rows = gather(self.keys, ids, self)
            values = rows if self.values is None else gather(self.values, ids, self)
        scores = self.metric.scores(flat, rows).masked_fill(ids < 0, self.metric.missing)
        shape = queries.shape[:-1]
        parts = (rows, values, scores, ids)
        return Hit(*(part.view(*shape, *part.shape[1:]) for part in parts))

    def gather(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Keys at ids (-1: zeros); differentiable."""
        with self.table.lock.read():
            return gather(self.keys, ids, self)

    def append(
        self, rows: Float[Tensor, "n W"], values: Float[Tensor, "n V"] | None = None
    ) -> Int[Tensor, " n"]:
        """Store new rows; returns their ids. SKELETON: no eviction yet."""
        start = self.table.extent
        ids = torch.arange(start, start + len(rows), device=self.keys.device)
        self.write(ids, rows, values)
        return ids

    def write(
        self,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n W"],
        values: Float[Tensor, "n V"] | None = None,
    ) -> None:
        """Overwrite rows; they are live and found from now on."""
        check_ids(ids, self.num_rows)
        check_rows(rows, len(ids), self.width)
        with torch.no_grad(), self.table.lock.write():
            self.index.update(ids, rows)
            if self.values is not None and values is not None:
                self.values.data.index_copy_(0, ids, values.to(self.values.dtype))

    def remove(self, ids: Int[Tensor, " n"]) -> None:
        """Take rows out."""
        self.index.remove(ids)

    def is_trainable(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which rows take gradients: live, not frozen, and selected if a selection is on."""
        safe = ids.clamp(min=0)
        return (ids >= 0) & self.book.live[safe] & ~self.book.frozen[safe]

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of distinct rows whose keys were changed in place, under `table.lock.write()`."""
        self.index.changed(ids)
