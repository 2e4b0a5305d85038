"""The rows that an index is derived from, and which of them are there."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.indexes.locks import ReadWriteLock


class RowTable:
    """Rows [N, W] of any floating dtype, and a mark for each that is there (live).

    Rows and marks may be lazily zero or memory-mapped: nothing here touches all of them. Whoever
    changes a row in place holds `lock.write()` and then tells the index (`Index.changed`).
    """

    def __init__(self, rows: Float[Tensor, "N W"], live: Bool[Tensor, " N"]) -> None:
        self.rows = rows
        self.live = live
        self.lock = ReadWriteLock()
        self.changes = 0  # how often marks were set: who keeps a list of live rows can see it age
        self.num_live = int(live.count_nonzero())
        self.extent = int(live.nonzero()[-1]) + 1 if self.num_live else 0  # rows beyond: not live

    @property
    def num_rows(self) -> int:
        """N, live or not."""
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        """W."""
        return self.rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What rows are computed with: float64 for float64 rows, else float32."""
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    def take(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Copies of rows, in the computing dtype."""
        flat = self.rows.index_select(0, ids.flatten())
        return flat.to(self.dtype).view(*ids.shape, self.width)

    def is_live(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of the rows are there."""
        return self.live.index_select(0, ids)

    def live_ids(self) -> Int[Tensor, " n"]:
        """Ids of all live rows, ascending; also while marks change."""
        # `nonzero` counts, then fills in: it fails on marks that change between the two.
        return self.live[: self.extent].clone().nonzero().squeeze(1)

    def block(self, start: int, stop: int) -> tuple[Int[Tensor, " n"], Float[Tensor, "n W"]]:
        """Ids, ascending, and rows of what is live in start..stop-1; not to be changed."""
        live = self.live[start:stop].clone()  # readers without the lock: it may change meanwhile
        if live.all():  # spares the copy, which costs as much as a third of a scan
            ids = torch.arange(start, stop, device=live.device)
            return ids, self.rows[start:stop].to(self.dtype)
        ids = live.nonzero().squeeze(1) + start
        return ids, self.take(ids)

    def put(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n W"]) -> None:
        """Write rows and mark them live. Ids are distinct."""
        self.rows.index_copy_(0, ids, rows.to(self.rows.dtype))
        self.set_live(ids, True)

    def set_live(self, ids: Int[Tensor, " n"], value: bool) -> None:
        """Mark rows as there or not. Ids are distinct."""
        if not len(ids):
            return
        before = int(self.live.index_select(0, ids).count_nonzero())
        self.live.index_fill_(0, ids, value)
        self.changes += 1
        self.num_live += (len(ids) if value else 0) - before
        if value:
            self.extent = max(self.extent, int(ids.max()) + 1)
