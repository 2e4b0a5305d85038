"""The buffer against a dictionary; what a scan of it finds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.indexes import buffer, exact
from sparsemem.indexes.buffer import Buffer, Known
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.kinds import comparable
from sparsemem.indexes.lists import OFFSET_BITS
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.scoring import TableScoring
from sparsemem.indexes.table import RowTable

N, W = 30, 4


def make() -> Buffer:
    return Buffer(RowTable(torch.randn(N, W).round(), torch.zeros(N, dtype=torch.bool)))


ids = st.lists(st.integers(0, N - 1), max_size=12)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), ids),
        st.tuples(st.just("drop"), ids),
        st.tuples(st.just("look"), st.integers(0, 40)),
    ),
    max_size=25,
)


@pytest.fixture(autouse=True, params=["auto", "reference"])
def _small(request, monkeypatch):
    """Compiled loops and those in numpy, in little room at first."""
    monkeypatch.setattr(buffer, "FIRST_CAPACITY", 2)
    monkeypatch.setenv("SPARSEMEM_KERNELS", request.param)


@settings(max_examples=150, deadline=None)
@given(operations)
def test_against_a_dictionary(steps):
    held, tested, rows = {}, make(), {}  # held: whether it waits, oldest change first
    for number, (what, arguments) in enumerate(steps):
        if what == "mark":
            tested.table.rows[arguments] = float(number)
            tested.mark(np.array(sorted(set(arguments)), np.int64))
            for i in sorted(set(arguments)):
                held[i] = held.pop(i) if held.get(i) else True
                rows[i] = float(number)
        elif what == "drop":
            gone = sorted({i for i in arguments if i in held})
            tested.drop(np.array(gone, np.int64))
            for i in gone:
                del held[i]
        else:
            waiting = {i for i in held if held[i]}
            looked = tested.waiting_longest(arguments).tolist()
            assert len(looked) == len(set(looked))
            assert set(looked) <= waiting
            assert len(looked) == min(arguments, len(waiting)) or _repeated(tested)
            tested.rest(np.array(looked, np.int64))
            held.update(dict.fromkeys(looked, False))
        assert sorted(tested.ids.tolist()) == sorted(held)
        assert tested.holds(np.arange(N)).nonzero()[0].tolist() == sorted(held)
        assert (tested.count, tested.waiting) == (len(held), sum(held.values()))
        assert tested.strays == len(held) - sum(held.values())
        packed = tested._rows[: tested.count, 0]
        assert packed.tolist() == [rows[i] for i in tested.ids.tolist()]


def _repeated(tested: Buffer) -> bool:
    """A row that left the queue and came again may stand in it twice, which costs a place."""
    queued = np.concatenate([*tested._queue, np.empty(0, np.int64)])
    return len(np.unique(queued)) < len(queued)


def test_rows_wait_in_the_order_of_their_changes():
    tested = make()
    for group in ([3, 4], [1], [3, 9], [0]):
        tested.mark(np.array(group))
    assert tested.waiting_longest(2).tolist() == [3, 4]
    assert tested.waiting_longest(3).tolist() == [1, 3, 4]
    tested.rest(np.array([3, 4]))
    assert tested.waiting_longest(2).tolist() == [1, 9]
    assert tested.waiting_longest(99).tolist() == [0, 1, 9]


def test_marks_tell_that_a_row_was_changed_again():
    tested = make()
    tested.mark(np.array([1, 2]))
    before = tested.marks[[1, 2]].copy()
    tested.mark(np.array([2]))
    assert (tested.marks[[1, 2]] == before).tolist() == [True, False]


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("block", [7, 1000])
def test_a_scan_finds_what_an_exact_search_of_these_rows_finds(metric, block, monkeypatch):
    monkeypatch.setattr(buffer, "BLOCK_ROWS", block)
    monkeypatch.setattr(exact, "SPARE", 0)  # ties go beyond what is scored at first
    rows = torch.randn(200, W, generator=torch.Generator().manual_seed(1)).round()
    table = RowTable(rows, torch.zeros(200, dtype=torch.bool))
    tested = Buffer(table)
    for start in (100, 0, 50):
        tested.mark(np.arange(start, start + 40))
    tested.drop(np.arange(110, 130))
    table.set_live(torch.from_numpy(np.sort(tested.ids)), True)
    queries = torch.randn(6, W, generator=torch.Generator().manual_seed(2)).round()
    index = ExactIndex(table, metric)
    index.scoring = TableScoring(table, metric)  # as the buffer's
    for k in (1, 5, 120):
        truth = index.search(queries, k)
        found = tested.scan(metric, queries, k)
        assert torch.equal(found.ids, truth.ids)
        assert torch.equal(found.scores, truth.scores)


def test_the_queue_does_not_grow_with_rows_that_come_and_go():
    tested = make()
    for _ in range(2_000):
        tested.mark(np.array([1, 2]))
        tested.mark(np.array([1, 2]))
        tested.drop(np.array([2]))
    assert sum(map(len, tested._queue)) == tested._queued <= 2 * 2 + 2  # two waited last
    assert len(tested._queue) <= 6
    assert tested.waiting_longest(9).tolist() == [1]


def test_recent_rows_are_those_that_wait_and_changed_since_the_last_call():
    tested = make()
    for group in ([3, 4], [1, 3], [8]):
        tested.mark(np.array(group))
    tested.drop(np.array([8]))
    tested.rest(np.array([4]))
    assert tested.take_recent().tolist() == [1, 3]
    assert tested.take_recent().tolist() == []
    for _ in range(100):
        tested.mark(np.array([3, 5, 8]))
        assert sum(map(len, tested._recent)) <= 2 * 4 + 2  # four wait, and two as above
    assert tested.take_recent().tolist() == [3, 5, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", list(Metric))
def test_rows_stay_that_are_near_their_centroids_or_as_near_as_before(metric, dtype):
    rows = torch.randn(N, W).to(dtype)
    rows[3, 1], rows[4], rows[5, 0] = torch.nan, 0, torch.inf
    table = RowTable(rows, torch.ones(N, dtype=torch.bool))
    tested, ids = Buffer(table), np.array([9, 3, 0, 4, 5, 12, 13, 14, 15])
    tested.mark(np.arange(2, 20))
    tested.mark(np.array([0]))
    tested.drop(np.array([2, 7]))
    numbers = np.random.default_rng(1)
    centroids = numbers.standard_normal((6, W)).astype(np.float32)
    label_of, places = np.zeros(N, np.int64), numbers.integers(0, 6, N) << OFFSET_BITS
    label_of[ids] = numbers.permutation(N)[: len(ids)] + 1
    label_of[13] = 0  # not in the index
    vectors = comparable(table.take(torch.from_numpy(ids)), metric).numpy()
    lists = places[label_of[ids] - 1] >> OFFSET_BITS
    away = ((vectors - centroids[lists]) ** 2).sum(1)
    usual, chosen = float(np.median(away)), np.zeros(N, np.float32)
    chosen[[9, 3]] = away[:2]  # as far as they were
    known = Known(label_of, places + 7, chosen, centroids)
    expected = (ids != 13) & ((away <= usual) | (np.arange(len(ids)) < 2))
    kept, *rest = tested.staying(metric, ids, known, usual * 1.001, 1.05)
    assert kept.tolist() == ids[expected].tolist()
    assert rest[0].tolist() == (label_of[kept] - 1).tolist()
    assert rest[1].tolist() == lists[expected].tolist()
    np.testing.assert_allclose(rest[2], vectors[expected], rtol=1e-6)
