"""Which rows new ones take: never used, then removed, then least recently used."""

from __future__ import annotations

import heapq

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.bank.book import RowBook

WINDOW = 1024  # rows looked at together
SHARE = 64  # of the rows that may give way, one in so many is queued at once


class Room:
    """Finds room for new rows. Choosing changes nothing: what is then written is taken.

    The order is: rows never used, lowest first; removed rows, lowest first; live rows that are
    not frozen, least recently accessed first, then lowest first. Nothing here costs O(N) a call:

    - A row that was used stays used, so the search for unused ones only moves forward.
    - Removed rows are in a heap. One that was written again is skipped when it comes up.
    - The live rows that come first in the order of (last access, id) are a *queue*, sorted when
      the last one is used up, 1/64 of all rows long. An entry counts while the row's last access
      is still what it was. That gives the exact order: an access sets a row's last access to a
      time later than any in the queue, so a row that was accessed since, or was not queued, comes
      after all entries that still count. An entry is used up by a row that gives way or by an
      access, so that sorting costs O(64) either. Only a frozen row that is released could belong
      into the middle, which ends the queue.
    """

    def __init__(self, book: RowBook) -> None:
        self._book = book
        self._unused = 0  # rows before it were used
        self._heap: list[int] = []
        self._in_heap: set[int] = set()
        self._offered: list[int] = []  # taken from the heap; back into it unless they are written
        self.released()

    def choose(self, count: int) -> Int[Tensor, " n"]:
        """The `count` rows that come first. There are as many: N - frozen."""
        self._take_back()
        chosen = self._never_used(count)
        removed = self._removed(count - len(chosen))
        chosen = torch.cat([chosen, chosen.new_tensor(removed)])
        missing = count - len(chosen)
        return torch.cat([chosen, self._least_recent(missing)]) if missing else chosen

    def find_removed(self) -> None:
        """Look for rows that were removed before this object was made: O(N)."""
        self.removed((~self._book.live & self._book.last_access.ne(0)).nonzero().squeeze(1))

    def removed(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of rows that were live and no longer are."""
        for row in ids.tolist():
            self._push(row)

    def released(self) -> None:
        """Be told that rows are no longer frozen."""
        self._queue = self._queued_access = self._book.last_access.new_empty(0)
        self._position = 0  # entries before it are used up

    def _never_used(self, count: int) -> Tensor:
        book, parts, missing = self._book, [self._queue[:0]], count
        start, size = self._unused, max(count, WINDOW)
        while missing and start < len(book.live):
            window = slice(start, start + size)
            unused = ~book.live[window] & book.last_access[window].eq(0)
            ids = unused.nonzero().squeeze(1)[:missing] + start
            if missing == count:  # none found before
                self._unused = int(ids[0]) if len(ids) else window.stop
            parts.append(ids)
            missing -= len(ids)
            start, size = window.stop, 2 * size
        return torch.cat(parts)

    def _removed(self, count: int) -> list[int]:
        while self._heap and len(self._offered) < count:
            missing = min(count - len(self._offered), len(self._heap))
            rows = [heapq.heappop(self._heap) for _ in range(missing)]
            self._in_heap.difference_update(rows)
            self._offered += self._not_live(rows)
        return self._offered

    def _take_back(self) -> None:
        for row in self._not_live(self._offered):
            self._push(row)
        self._offered = []

    def _not_live(self, rows: list[int]) -> list[int]:
        """Those of the rows that are not live, in one look."""
        if not rows:
            return []
        live = self._book.live
        marks = live.index_select(0, torch.tensor(rows, device=live.device)).tolist()
        return [row for row, mark in zip(rows, marks, strict=True) if not mark]

    def _push(self, row: int) -> None:
        if row not in self._in_heap:
            self._in_heap.add(row)
            heapq.heappush(self._heap, row)

    def _least_recent(self, count: int) -> Tensor:
        found = self._first_queued(count)
        if len(found) < count:
            self._sort(count)
            found = self._first_queued(count)
        return found

    def _first_queued(self, count: int) -> Tensor:
        """The first entries that count, at most `count`."""
        book, parts, missing = self._book, [self._queue[:0]], count
        start, size = self._position, max(count, WINDOW)
        while missing and start < len(self._queue):
            window = slice(start, start + size)
            ids = self._queue[window]
            valid = book.last_access.index_select(0, ids) == self._queued_access[window]
            valid &= book.live.index_select(0, ids) & ~book.frozen.index_select(0, ids)
            places = valid.nonzero().squeeze(1)[:missing]
            if missing == count:  # the entries before the first that counts are used up
                self._position = start + int(places[0]) if len(places) else window.stop
            parts.append(ids[places])
            missing -= len(places)
            start, size = window.stop, 2 * size
        return torch.cat(parts)

    def _sort(self, count: int) -> None:
        """Queue the rows that come first, at least `count`: O(N)."""
        book = self._book
        ids = (book.live & ~book.frozen).nonzero().squeeze(1)
        access = book.last_access.index_select(0, ids)
        size = min(len(ids), max(count, len(ids) // SHARE))
        bound = access.kthvalue(size).values
        older = (access < bound).nonzero().squeeze(1)
        tied = (access == bound).nonzero().squeeze(1)[: size - len(older)]
        queued = torch.cat([older, tied])
        self._queued_access, order = access[queued].sort(stable=True)
        self._queue, self._position = ids[queued[order]], 0
