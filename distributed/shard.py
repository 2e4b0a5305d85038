"""One shard of a bank: its rows, and what it is asked to do with them.

All ids here are the shard's own (`Placement.local`). Clock times are the caller's.
Shape letters: Q queries, K rows a query, n rows of a call, W and V widths of keys and values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.bank import MemoryBank
from sparsemem.bank.book import FOREVER
from sparsemem.bank.rows import taken
from sparsemem.distributed.merging import Offer

NEVER_USED, REMOVED, LIVE = 0, 1, 2  # ranks of an offer


class ShardFound(NamedTuple):
    """What one shard found, with the rows themselves: the merger asks nobody again."""

    scores: Float[Tensor, "Q K"]
    ids: Int[Tensor, "Q K"]
    rows: Float[Tensor, "Q K W"]
    values: Float[Tensor, "Q K V"] | None  # None: the rows are the values


class ShardBank(MemoryBank):
    """A bank whose clock is its callers': they say at which time they call.

    The clock never goes back: where several call, a late one's time is the one it has got to.
    """

    def find(self, queries: Float[Tensor, "Q W"], top_k: int, time: int) -> ShardFound:
        """The best live rows of each query, and what they hold. Not an access: see `mark`."""
        self._reach(time)
        self.refresh()
        self._expire_before(self.book.now)
        with torch.no_grad(), self.table.lock.read():
            found = self.index.search(queries.to(self.computing_dtype), min(top_k, self.num_rows))
            tables = (self.keys, self.values)
            rows, values = (
                None if table is None else taken(table.data, found.ids, self.computing_dtype)
                for table in tables
            )
        assert rows is not None
        return ShardFound(*found, rows, values)

    def mark(self, ids: Int[Tensor, " n"], time: int) -> None:
        """Count an access of each row, repeats as often, by the call at `time`."""
        self._reach(time)
        with self.table.lock.read():
            self._accessed(ids)

    def rows_at(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n W"]:
        """Keys, in the computing dtype."""
        with self.table.lock.read():
            return taken(self.keys.data, ids, self.computing_dtype)

    def offer(self, count: int, time: int) -> tuple[Offer, int]:
        """The first rows that would give way to new ones; and how many could in all."""
        self._reach(time - 1)
        with self._changing():
            able = self.num_rows - self.book.num_frozen
            ids = self._room.choose(min(count, able))
            live, last = (
                column.index_select(0, ids) for column in (self.book.live, self.book.last_access)
            )
        rank = torch.where(live, LIVE, torch.where(last > 0, REMOVED, NEVER_USED))
        return Offer(ids, rank, last), able

    def take(
        self,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n W"],
        values: Float[Tensor, "n V"] | None,
        tags: Int[Tensor, " n"],
        ttl: int,
        last_access: Int[Tensor, " n"],
        time: int,
    ) -> bool:
        """New rows at ids that were chosen of what was offered.

        False, and nothing done, if one of them was used since (its last access is another):
        somebody else appended or wrote between the offer and this.
        """
        self._reach(time - 1)
        with self._changing():
            if not torch.equal(self.book.last_access.index_select(0, ids), last_access):
                return False
            self._reach(time)
            if values is None and self.values is not None:
                values = self.values.new_zeros(len(rows), self.values.shape[1])
            expiry = torch.full_like(ids, self.book.now + ttl + 1 if ttl else FOREVER)
            self._put(ids, rows, values, tags, expiry, anew=True)
        return True

    def write_at(self, ids: Int[Tensor, " n"], given: dict[str, Any], time: int) -> None:
        """`write`, as the call at `time`."""
        self._reach(time - 1)
        self.write(ids, **given)

    def remove_at(
        self, ids: Int[Tensor, " n"] | None, tag: int | None, time: int
    ) -> Int[Tensor, " removed"]:
        """`remove`; it is no call of the clock, which stands at `time`."""
        self._reach(time)
        return self.remove(ids, tag=tag)

    def expire_at(self, time: int) -> None:
        """`expire`, with the clock at `time`."""
        self._reach(time)
        self.expire()

    def stats_at(self, time: int) -> dict[str, Any]:
        """`stats`, with rows out whose time is over by the call at `time`."""
        self._reach(time)
        self._expire_before(self.book.now)
        return self.stats()

    def freeze_at(self, ids: Int[Tensor, " n"] | None, frozen: bool) -> None:
        """`freeze` or `unfreeze`."""
        self._set_frozen(ids, frozen)

    def live_of(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which rows are live."""
        with self.table.lock.read():
            return self.book.live.index_select(0, ids)

    def trainable_of(self, ids: Int[Tensor, " n"], since: int) -> Bool[Tensor, " n"]:
        """Which rows take gradients of what was read at time `since`."""
        with self.table.lock.read():
            return self.is_trainable(ids, since)

    def _reach(self, time: int) -> None:
        with self.book._lock:
            self.book.clock.clamp_(min=time)
