"""When rows with a time to live go: O(1) a row that comes, O(1) a row that goes."""

from __future__ import annotations

import heapq
import sys

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.bank.book import FOREVER, RowBook

SLACK = 1024  # entries out of date that are never worth a clean-up


class ExpirySchedule:
    """Rows by the clock time at which they go, and a heap of those times.

    An entry counts while its row is live and the book still has the same time for it; all others
    are out of date, and are left until their time comes or they are the greater part.
    """

    def __init__(self, book: RowBook) -> None:
        self._book = book
        self._times: list[int] = []  # a heap
        self._rows: dict[int, list[Tensor]] = {}
        self._entries = 0

    @property
    def next(self) -> int:
        """The earliest time at which a row may go. Any thread may ask, without the table's lock.

        The list is never seen half-made: one call changes the heap, or another heap takes its
        place. Rows that go are gone before their time is.
        """
        try:
            return self._times[0]
        except IndexError:  # which is also how the last time goes, between a look and another
            return sys.maxsize

    def add(self, ids: Int[Tensor, " n"], expiry: Int[Tensor, " n"]) -> None:
        """Schedule distinct rows; scheduling them again for the same time does no harm."""
        for time in torch.unique(expiry).tolist():
            if time not in self._rows:
                heapq.heappush(self._times, time)
                self._rows[time] = []
            self._rows[time].append(ids[expiry == time])
        self._entries += len(ids)

    def rows(self) -> Int[Tensor, " n"]:
        """The rows that go at time `next`."""
        ids: Tensor = torch.unique(torch.cat(self._rows[self.next]))
        live, expiry = (
            column.index_select(0, ids) for column in (self._book.live, self._book.expiry)
        )
        return ids[live & (expiry == self.next)]

    def advance(self) -> None:
        """Those are gone: on to the next time."""
        self._entries -= sum(len(ids) for ids in self._rows.pop(heapq.heappop(self._times)))

    def tidy(self, num_live: int) -> None:
        """Leave out what is out of date, if most entries are: O(1) an entry that was added."""
        if self._entries <= 2 * num_live + SLACK:
            return
        ids = torch.unique(torch.cat([part for parts in self._rows.values() for part in parts]))
        self._start(ids[self._book.live.index_select(0, ids)])

    def restart(self) -> None:
        """Schedule the rows that the book has an expiry for: O(N)."""
        self._start((self._book.expiry.ne(0) & self._book.live).nonzero().squeeze(1))

    def _start(self, ids: Tensor) -> None:
        """Schedule these live rows, those that are to go, and no others."""
        expiry = self._book.expiry.index_select(0, ids)
        new = ExpirySchedule(self._book)
        new.add(ids[expiry != FOREVER], expiry[expiry != FOREVER])
        self._times, self._rows, self._entries = new._times, new._rows, new._entries
