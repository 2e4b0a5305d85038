from unittest import mock

import torch

from sparsemem import MemoryBank
from sparsemem.bank import usage
from sparsemem.bank.book import RowBook
from sparsemem.bank.usage import SHARE, Room
from tests.oracles.sharded import makers


def book_of(live, last_access, frozen=None):
    book = RowBook(len(live), None)
    book.live.copy_(torch.tensor(live, dtype=torch.bool))
    book.last_access.copy_(torch.tensor(last_access))
    if frozen is not None:
        book.frozen.copy_(torch.tensor(frozen, dtype=torch.bool))
    return book


def test_never_used_rows_come_before_removed_ones_before_old_ones():
    #                  0  1  2  3  4  5
    book = book_of([1, 0, 0, 1, 0, 1], [7, 3, 0, 5, 0, 5])
    room = Room(book)
    room.find_removed()
    assert room.choose(2).tolist() == [2, 4]
    assert room.choose(6).tolist() == [2, 4, 1, 3, 5, 0]  # choosing takes nothing
    assert room.choose(0).tolist() == []


def test_frozen_rows_are_left_and_come_in_their_place_once_released():
    book = book_of([1] * 5, [1, 2, 3, 4, 5], [1, 0, 1, 0, 0])
    room = Room(book)
    assert room.choose(3).tolist() == [1, 3, 4]
    book.frozen[0] = False
    room.released()
    assert room.choose(4).tolist() == [0, 1, 3, 4]


@makers(1, 3, 4)
def test_a_released_row_comes_before_those_queued_meanwhile(make):
    with mock.patch.object(usage, "SHARE", 1):  # all rows are queued at once
        bank = make(6, 2)
        bank.append(torch.ones(6, 2))
        bank.freeze(torch.tensor([0, 2]))
        assert bank.append(torch.ones(1, 2)).tolist() == [1]
        bank.unfreeze(torch.tensor([2]))
        assert bank.append(torch.ones(2, 2)).tolist() == [2, 3]
        bank.unfreeze()
        assert bank.append(torch.ones(4, 2)).tolist() == [0, 4, 5, 1]


def test_what_is_chosen_but_not_written_is_there_again():
    book = book_of([0, 0, 1], [4, 4, 5])
    room = Room(book)
    room.removed(torch.tensor([1, 0]))
    assert room.choose(1).tolist() == [0]
    assert room.choose(2).tolist() == [0, 1]
    book.live[0] = True  # now it was written
    assert room.choose(1).tolist() == [1]


def test_sorts_once_in_many_evictions():
    """Of N live rows N / 64 give way, or are accessed, for each time that all are looked at."""
    num_rows = 64 * SHARE
    bank = MemoryBank(num_rows, 2, metric="ip")
    bank.append(torch.ones(num_rows, 2))
    sorts, sort = [], bank._room._sort

    def counted(count):
        sorts.append(count)
        sort(count)

    bank._room._sort = counted
    taken = [int(bank.append(torch.ones(1, 2))) for _ in range(130)]
    assert taken == list(range(130))
    assert len(sorts) == 3


@makers(1, 3, 4)
def test_an_access_counts_like_a_write(make):
    bank = make(4, 2, metric="ip")
    bank.append(torch.eye(2))
    bank.append(-torch.eye(2))
    bank.read(torch.tensor([1.0, 0.1]), 1)  # row 0
    assert bank.append(torch.ones(3, 2)).tolist() == [1, 2, 3]
    bank.write(torch.tensor([0]), torch.ones(1, 2))
    assert bank.append(torch.ones(4, 2)).tolist() == [1, 2, 3, 0]
