"""One shard of a bank: its rows, and what it is asked to do with them.

All ids here are the shard's own (`Placement.local`). Clock times are the caller's.
Shape letters: Q queries, K rows a query, n rows of a call, W and V widths of keys and values.
"""

from __future__ import annotations

import time as times
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.bank import MemoryBank
from sparsemem.bank.book import FOREVER
from sparsemem.bank.rows import FILLED_AT_ONCE, fill_normal, taken
from sparsemem.bank.selection import Candidates, Tally
from sparsemem.distributed.merging import Offer
from sparsemem.optim.remote import Push, RowStep

NEVER_USED, REMOVED, LIVE = 0, 1, 2  # ranks of an offer


OfRows = TypeVar("OfRows", Push, RowStep)
Standing = tuple[int, int, bool]  # clock, `changes`, and whether some live rows take no gradient


class Counted(NamedTuple):
    """Queries, k, and the worst score of each that is among the k best of all shards."""

    queries: Float[Tensor, "q W"]
    k: int
    worst: Float[Tensor, " q"]


class ShardFound(NamedTuple):
    """What one shard found. Rows are sent once it is known which: see `ShardBank.fetch`."""

    scores: Float[Tensor, "Q K"]
    ids: Int[Tensor, "Q K"]
    standing: Standing


class ShardBank(MemoryBank):
    """A bank whose clock is its callers': they say at which time they call.

    The clock never goes back: where several call, a late one's time is the one it has got to.
    Answers tell of it, and of `changes`: a number that is another one whenever rows were written,
    removed, frozen, released or selected since.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.changes = times.time_ns()  # that of a shard that came back is none it had before
        self._open: dict[str, Tally] = {}  # batches of the background, by the callers' names

    @torch.no_grad()
    def fill_share(
        self, shard: int, num_shards: int, num_rows: int, generator: torch.Generator | None
    ) -> None:
        """All rows are there from the start, those that one bank of `num_rows` would have.

        generator: of their numbers; None: they are zeros.
        """
        if generator is not None:
            for table in self.tables:
                draw_share(table, shard, num_shards, num_rows, generator)
        self.book.live.fill_(True)
        self.rebind()

    @property
    def standing(self) -> Standing:
        """What answers tell of the shard."""
        partly = self.book.num_frozen > 0 or self.book.selection is not None
        return self.book.now, self.changes, partly

    def find(self, queries: Float[Tensor, "Q W"], top_k: int, time: int) -> ShardFound:
        """The best live rows of each query. Not an access: see `fetch`."""
        self._reach(time)
        self.refresh()
        self._expire_before(self.book.now)
        with torch.no_grad(), self.table.lock.read():
            found = self.index.search(queries.to(self.computing_dtype), min(top_k, self.num_rows))
            return ShardFound(*found, self.standing)

    def fetch(
        self, ids: Int[Tensor, " n"], time: int, batch: str, narrow: bool, counted: Counted | None
    ) -> list[Float[Tensor, "n W"]]:
        """What rows hold, table by table; an access of each, as `mark` counts it.

        They come in the tables' dtype.

        Args:
            narrow: in float16, where that is less.
            counted: some queries of the read, for the index to be tuned for: see `Index.tell`.
        """
        self.mark(ids, time, batch)
        if counted is not None:
            self.index.tell(*counted)
        dtype = torch.float16 if narrow and self.keys.itemsize > 2 else self.keys.dtype
        with self.table.lock.read():
            return [taken(table.data, ids, dtype) for table in self.tables]

    def mark(self, ids: Int[Tensor, " n"], time: int, batch: str = "") -> None:
        """Count an access of each row, repeats as often, by the call at `time`.

        batch: the open batch of the background that they belong to, if any.
        """
        self._reach(time)
        with self.table.lock.read():
            if not batch:
                self._accessed(ids)
                return
            self.book.accessed(ids)
            self._open.setdefault(batch, Tally(self.num_rows)).add(ids)

    def end_background(self, batch: str, counts: bool) -> None:
        """A batch of the background is over. counts: it did not fail."""
        tally = self._open.pop(batch, None) or Tally(self.num_rows)
        if counts:
            with torch.no_grad(), self.table.lock.write():
                self._selection.count_background(tally)

    def total_accesses(self) -> int:
        """Accesses since the last selection, outside the background."""
        with self.table.lock.read():
            return self._selection.total()

    def candidates(self, top: int, total: int) -> Candidates:
        """The rows that come first for a selection, of `total` accesses of all shards."""
        with torch.no_grad(), self.table.lock.read():
            return self._selection.candidates(top, total)

    def select_rows(self, ids: Int[Tensor, " n"] | None) -> None:
        """Only these rows are trainable; None: all are."""
        with torch.no_grad(), self.table.lock.write():
            self.changes += 1
            if ids is None:
                self._selection.lift()
            else:
                self._selection.mark(ids)

    def selection_state(self) -> tuple[Tensor | None, Tensor]:
        """The rows that are selected (None: all are), and the accesses since: each row as often.

        A bank's folder leaves them out: there a selection ends with the process.
        """
        with self.table.lock.read():
            ids, counts = self._selection.counted()
            return self.book.selection, ids.repeat_interleave(counts)

    def load_selection(self, selected: Tensor | None, accessed: Tensor) -> None:
        """Go on from there."""
        if selected is not None:
            self._selection.mark(selected)
        self._selection.accessed(accessed)

    def rows_at(self, ids: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n W"], Standing]:
        """Keys, in the computing dtype."""
        with self.table.lock.read():
            rows = taken(self.keys.data, ids, self.computing_dtype)
            return rows, self.standing

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
    ) -> int:
        """New rows at ids that were chosen of what was offered; the clock then.

        0, and nothing done, if one of them was used since (its last access is another):
        somebody else appended or wrote between the offer and this.
        """
        self._reach(time - 1)
        with self._changing():
            if not torch.equal(self.book.last_access.index_select(0, ids), last_access):
                return 0
            self.book.tick()
            if values is None and self.values is not None:
                values = self.values.new_zeros(len(rows), self.values.shape[1])
            expiry = torch.full_like(ids, self.book.now + ttl + 1 if ttl else FOREVER)
            self._put(ids, rows, values, tags, expiry, anew=True)
            return self.book.now

    def write_at(self, ids: Int[Tensor, " n"], given: dict[str, Any], time: int) -> int:
        """`write`, as the call at `time`; the clock then."""
        self._reach(time - 1)
        self.write(ids, **given)
        return self.book.now

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

    def tags_at(self, ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Tags of rows."""
        return self.tags_of(ids)

    def trainable_of(
        self, ids: Int[Tensor, " n"], since: int | None
    ) -> tuple[Bool[Tensor, " n"], Standing]:
        """Which rows take gradients of what was read at time `since` (None: now)."""
        with self.table.lock.read():
            return self.is_trainable(ids, since), self.standing

    def unwritten(self, part: OfRows) -> OfRows:
        """Without the rows that were written since the gradient was known to be theirs."""
        if self.book.last_written <= part.since:
            return part
        kept = self.book.written.index_select(0, part.ids) <= part.since
        return part._replace(ids=part.ids[kept], gradient=part.gradient[kept])

    def _put(self, *arguments: Any, **options: Any) -> None:
        self.changes += 1
        super()._put(*arguments, **options)

    def _apply_drop(self, ids: Tensor) -> None:
        self.changes += 1
        super()._apply_drop(ids)

    def _flag(self, ids: Tensor, frozen: Tensor) -> None:
        self.changes += 1
        super()._flag(ids, frozen)

    def _reach(self, time: int) -> None:
        with self.book._lock:
            self.book.clock.clamp_(min=time)


def draw_share(
    table: Float[Tensor, "n W"],
    shard: int,
    num_shards: int,
    num_rows: int,
    generator: torch.Generator,
) -> None:
    """A shard's share of `num_rows` rows of random numbers N(0, 1/W)."""
    width = table.shape[1]
    step = max(1, FILLED_AT_ONCE // width)
    for start in range(0, num_rows, step):
        part = torch.empty(min(step, num_rows - start), width)
        fill_normal(part, generator, width**-0.5)
        own = part[(shard - start) % num_shards :: num_shards]
        first = (start + num_shards - 1 - shard) // num_shards
        table[first : first + len(own)] = own.to(table.dtype)
