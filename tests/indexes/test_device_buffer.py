"""The buffer of a device against a dictionary; what it finds; that telling it waits for nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.indexes import device_buffer
from sparsemem.indexes.device_buffer import DeviceBuffer
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.synchronisations import Synchronisations

N, W = 30, 4


def make(device="cpu") -> DeviceBuffer:
    rows = torch.randn(N, W, device=device).round()
    return DeviceBuffer(RowTable(rows, torch.ones(N, dtype=torch.bool, device=device)))


ids = st.lists(st.integers(0, N - 1), max_size=12)
operations = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["mark", "drop", "remove"]), ids),
        st.tuples(st.sampled_from(["tidy", "rest"]), st.integers(0, 20)),
    ),
    max_size=25,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(device_buffer, "FIRST_CAPACITY", 2)


def tensor(numbers) -> torch.Tensor:
    return torch.tensor(sorted(set(numbers)), dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_against_a_dictionary(steps):
    held, tested = {}, make()  # held: whether it waits, oldest change first, and its row
    for number, (what, arguments) in enumerate(steps):
        if what == "mark":
            some = tensor(arguments)
            tested.table.put(some, torch.full((len(some), W), float(number)))
            tested.mark(some)
            for row in some.tolist():
                held.pop(row, None)
                held[row] = (True, float(number))
        elif what in ("drop", "remove"):
            some = tensor(arguments)
            if what == "remove":  # as an index does
                tested.table.set_live(some, False)
            tested.drop(some)
            for row in some.tolist():
                held.pop(row, None)
        else:
            tested.tidy()
            assert tested.count == tested.settled == len(held)
            waiting = [row for row in held if held[row][0]]
            longest = tested.longest(arguments)
            assert longest.tolist() == waiting[:arguments]
            assert tested.unchanged(longest).all()
            if what == "rest":
                tested.rest(longest)
                for row in longest.tolist():
                    held[row] = (False, held[row][1])
        strays = sum(not waits for waits, _ in held.values())
        assert tested.counts() == (len(held), strays)
        assert tested.count >= len(held)
        assert tested.waiting >= len(held) - strays
        assert tested.holds(torch.arange(N)).nonzero().flatten().tolist() == sorted(held)
        places = tested.place[list(held)].long() - 1
        assert tested.ids[places].tolist() == list(held)
        assert tested._rows[places, 0].tolist() == [row for _, row in held.values()]


def test_a_row_told_twice_at_once_is_there_once():
    tested = make()
    tested.mark(torch.tensor([3, 5, 3]))
    assert tested.counts() == (2, 0)
    tested.tidy()
    assert sorted(tested.longest(9).tolist()) == [3, 5]


def test_rows_that_change_all_the_time_take_no_more_room(device):
    tested = make(device)
    hot = torch.arange(8, device=device)
    for _ in range(200):
        tested.mark(hot)
    assert len(tested.ids) <= 64
    assert tested.counts() == (8, 0)
    assert tested.marked == 1600


def test_what_changed_between_is_not_as_it_was():
    tested = make()
    tested.mark(torch.arange(6))
    tested.tidy()
    longest = tested.longest(5)
    tested.mark(torch.tensor([1]))
    tested.drop(torch.tensor([3]))
    tested.table.set_live(torch.tensor([4]), False)
    assert tested.unchanged(longest).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("numbers", [2**25, 40])
@pytest.mark.parametrize("metric", Metric)
def test_finds_the_best_and_bounds_the_rest(metric, numbers, device, monkeypatch):
    monkeypatch.setattr(device_buffer, "SCANNED_NUMBERS", numbers)
    tested = make(device)
    some = torch.arange(0, N, 2, device=device)
    tested.mark(some)
    tested.mark(some[:4])
    tested.table.set_live(torch.arange(1, N, 2, device=device), False)
    truth = ExactIndex(tested.table, metric)
    queries = torch.randn(7, W, device=device)
    for k in (1, 3, 40):
        ids, beyond = tested.best(metric, queries, k)
        best = truth.search(queries, min(k, len(some)))
        there = (ids.unsqueeze(1) == best.ids.unsqueeze(2)).any(2)
        certain = beyond < best.scores[:, -1] * metric.sign
        assert there[certain].all()
        assert certain.any()
        for row, found in zip(ids.tolist(), (ids >= 0).sum(1).tolist(), strict=True):
            assert len({row_id for row_id in row if row_id >= 0}) == found


def test_an_empty_buffer_finds_nothing():
    ids, beyond = make().best(Metric.l2, torch.randn(3, W), 2)
    assert ids.shape == (3, 0)
    assert beyond.tolist() == [-torch.inf] * 3


def test_telling_of_changes_waits_for_nothing():
    tested = make()
    tested._reserve(100)
    some = torch.arange(10)
    with Synchronisations() as waits:
        tested.mark(some)
        tested.drop(some)
        tested.mark(some)
    assert waits.found == []


def test_entries_that_later_ones_replaced_are_counted_once():
    buffer = make()
    buffer.mark(torch.tensor([1, 2, 1, 3, 1]))
    buffer.mark(torch.tensor([2, 4]))
    buffer.drop(torch.tensor([4]))  # has left, and was not told again
    buffer.tidy()
    assert buffer.ids[: buffer.count].tolist() == [3, 1, 2]
    assert buffer.take_replaced() == 3  # twice 1, once 2
    assert buffer.take_replaced() == 0
    buffer.mark(torch.tensor([1, 1, 1]))
    buffer.tidy()
    assert buffer.ids[: buffer.count].tolist() == [3, 2, 1]
    assert buffer.take_replaced() == 3


def test_what_replaces_entries_that_were_here_at_a_check_is_not_counted_after_it():
    buffer = make()
    buffer.mark(torch.tensor([1, 2, 3, 1]))
    buffer.forget_replaced()
    buffer.mark(torch.tensor([2, 3, 4, 4, 5, 5]))  # 2 and 3 were there
    buffer.tidy()
    assert 0 <= buffer.take_replaced() <= 4  # of six entries 4 and 5 alone are new here
    buffer.mark(torch.tensor([4, 4, 5]))
    buffer.tidy()
    assert buffer.take_replaced() == 3
