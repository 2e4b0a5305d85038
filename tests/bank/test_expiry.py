import sys

import torch

from sparsemem.bank.book import RowBook
from sparsemem.bank.expiry import SLACK, ExpirySchedule


def entered(book: RowBook, ids: torch.Tensor, expiry: torch.Tensor) -> None:
    book.live[ids] = True
    book.expiry[ids] = expiry


def due(schedule: ExpirySchedule) -> dict[int, list[int]]:
    """Which rows go when, until none is left."""
    times = {}
    while schedule._times:
        rows = schedule.rows().tolist()
        if rows:
            times[schedule.next] = rows
        schedule.advance()
    return times


def test_renewed_rows_leave_no_heap_of_old_entries_and_need_no_look_at_all_rows(monkeypatch):
    book = RowBook(1000, None)
    schedule = ExpirySchedule(book)
    monkeypatch.setattr(schedule, "restart", lambda: 1 / 0)  # O(N)
    ids = torch.arange(10)
    for time in range(1, 2000):
        expiry = time + ids
        entered(book, ids, expiry)
        schedule.add(ids, expiry)
        schedule.tidy(num_live=10)
        assert schedule._entries <= 2 * 10 + SLACK
    assert due(schedule) == {1999 + row: [row] for row in range(10)}


def test_rows_gone_or_no_longer_to_go_are_left_out(monkeypatch):
    book = RowBook(SLACK * 4, None)
    schedule = ExpirySchedule(book)
    monkeypatch.setattr(schedule, "restart", lambda: 1 / 0)
    ids = torch.arange(SLACK * 3)
    entered(book, ids, torch.full_like(ids, 5))
    schedule.add(ids, book.expiry[ids])
    book.live[ids[4:]] = False
    book.expiry[3] = 0  # to stay
    schedule.tidy(num_live=4)
    assert schedule._entries == 3
    assert due(schedule) == {5: [0, 1, 2]}


def test_the_next_time_can_be_asked_for_while_the_last_one_goes():
    class Vanishing(list):
        """A heap whose last time another thread takes between a look and the next."""

        def __bool__(self):
            there = len(self) > 0
            self.clear()
            return there

    schedule = ExpirySchedule(RowBook(4, None))
    schedule._times = Vanishing([7])
    assert schedule.next in (7, sys.maxsize)


def test_a_clean_up_never_hides_a_time(monkeypatch):
    book = RowBook(8, None)
    schedule = ExpirySchedule(book)
    ids = torch.arange(2)
    entered(book, ids, torch.full_like(ids, 5))
    schedule.add(ids, book.expiry[ids])
    seen, add = [], ExpirySchedule.add

    def watched(self, *arguments):
        seen.append(schedule.next)  # as a thread that reads would at this moment
        add(self, *arguments)
        seen.append(schedule.next)

    monkeypatch.setattr(ExpirySchedule, "add", watched)
    schedule.restart()
    assert seen == [5, 5]
    assert due(schedule) == {5: [0, 1]}
