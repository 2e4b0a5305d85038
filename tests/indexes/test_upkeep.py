"""When a fresh index absorbs, measures, tunes and trains anew; what failure leaves."""

import gc
import threading
import time
import warnings
import weakref

import pytest
import torch

from sparsemem.indexes.derived import Derived
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.fresh_index import LISTS, K, N, W, agreement, clustered, make, wait_for

pytestmark = pytest.mark.usefixtures("told")


@pytest.mark.parametrize(("name", "method"), [(LISTS, "encode_vectors"), ("Flat", "add")])
def test_an_interrupted_absorption_leaves_the_truth(name, method, monkeypatch, told):
    index = make(name, buffer_rows=10)
    rows = clustered(30, seed=4)
    broken = index.current

    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(broken, "faiss", _Failing(broken.faiss, **{method: fail}))
    with pytest.warns(UserWarning, match=rf"upkeep of index '{name}': MemoryError\('no room'\)"):
        index.update(torch.arange(30), rows)
    assert index.stats()["buffered"] == 30
    assert "no room" in index.stats()["error"]
    assert index.search(rows, 1).ids.flatten().tolist() == list(range(30))
    monkeypatch.undo()
    index.update(torch.arange(5), rows[:5])
    assert index.stats()["buffered"] < 30
    assert index.search(rows, 1).ids.flatten().tolist() == list(range(30))
    told.clear()


class _Failing:
    """A FAISS index of which one method fails."""

    def __init__(self, real, **replaced):
        self._real = real
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._real, name)


def test_a_failing_build_leaves_the_old_index(monkeypatch):
    index = make(min_recall=None)
    old = index.current

    def fail(self, stopped=None):
        raise RuntimeError("no training")

    monkeypatch.setattr(Derived, "build", fail)
    with pytest.raises(RuntimeError, match="no training"):
        index.rebuild()
    assert index.current is old
    assert index.next is None
    index.update(torch.tensor([3]), 9 * torch.ones(1, W))
    assert index.search(torch.ones(1, W), 1).ids.tolist() == [[3]]


def test_a_failing_build_in_the_background_is_told_and_does_not_stop_searches(monkeypatch, told):
    def fail(self, stopped=None):
        raise RuntimeError("no training")

    monkeypatch.setattr(Derived, "build", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = make(background=True)
        wait_for(lambda: index.stats()["error"] is not None)
    assert "no training" in index.stats()["error"]
    assert agreement(index, clustered(10, seed=1)) == 1.0
    index.close()
    told.clear()


def test_changes_during_a_build_are_found_before_and_after_the_swap(monkeypatch):
    index = make(background=True, exact_below=N + 1)
    index.exact_below = 1
    real, reached, go_on = Derived.build, threading.Event(), threading.Event()

    def slow(self, stopped):
        real(self, stopped)
        reached.set()
        assert go_on.wait(20)

    monkeypatch.setattr(Derived, "build", slow)
    index.upkeep._worker.wake()
    assert reached.wait(20)
    rows = clustered(30, seed=5)
    index.update(torch.arange(30), rows)
    index.remove(torch.arange(30, 40))
    assert index.search(rows, 1).ids.flatten().tolist() == list(range(30))
    go_on.set()
    wait_for(lambda: index.stats()["rebuilds"] == 1)
    assert not index.stats()["exact"]
    assert index.search(rows, 1).ids.flatten().tolist() == list(range(30))
    seen = index.search(clustered(200, seed=6), 20).ids
    assert not set(range(30, 40)) & set(seen.flatten().tolist())
    index.close()


def test_looks_harder_when_live_queries_are_not_served():
    # Queries between the clusters: one list is not enough for them.
    queries = torch.randn(400, W, generator=torch.Generator().manual_seed(8))
    index = make(min_recall=0.97)
    index.current.setting = index.current.setting._replace(effort=1)
    poor = agreement(index, queries)
    assert poor < 0.97
    index.upkeep._changes = 10**6  # a check is due
    index.search(queries, K)
    assert index.stats()["effort"] > 1
    assert agreement(index, queries) >= 0.97
    assert index.stats()["recall"] >= 0.97


def test_the_watch_looks_harder_between_checks():
    queries = torch.randn(300, W, generator=torch.Generator().manual_seed(8))
    index = make(min_recall=0.97)
    index.search(queries, K)
    tuned = index.stats()["effort"]
    index.current.setting = index.current.setting._replace(effort=1)
    for number in range(60):
        index.current.buffer.marked += 512  # as if rows drifted
        index.search(queries[number : number + 64], K)
    assert tuned / 2 <= index.stats()["effort"] <= 16
    assert index.stats()["recall"] > 0.97  # no check was due in between
    assert agreement(index, queries) >= 0.95


def test_a_floor_out_of_reach_ends_in_exact_search(told):
    with pytest.warns(UserWarning, match=r"'LSH' reaches a recall of 0\.\d+ at most"):
        index = make("LSH", rows=clustered(5000), min_recall=1.0)
    assert index.stats()["exact"]
    assert agreement(index, clustered(20, seed=1)) == 1.0
    told.clear()


def test_without_a_floor_nothing_is_tuned():
    index = make(min_recall=None)
    assert index.current.setting == index.current.start
    index.upkeep._changes = 10**6
    index.search(clustered(20, seed=1), K)
    assert index.current.setting == index.current.start
    assert index.stats()["recall"] is not None
    index.search(clustered(200, seed=2), K)
    assert not index.upkeep._check_due()  # and it is not measured at every search


def test_a_greater_k_is_tuned_for():
    queries = torch.randn(200, W, generator=torch.Generator().manual_seed(8))
    index = make(min_recall=0.95)
    index.search(queries, 1)
    before = index.stats()["effort"]
    for start in range(0, 200, 4):
        index.search(queries[start : start + 4], 60)
    assert index.stats()["effort"] > before
    assert agreement(index, queries, 60) >= 0.93


def test_no_queries_are_no_reason_to_look_harder():
    index = make(min_recall=0.95)
    for _ in range(40):
        index.current.buffer.marked += 512
        found = index.search(torch.zeros(0, W), K)
    assert found.ids.shape == (0, K)


def test_a_check_of_what_was_replaced_meanwhile_says_nothing(monkeypatch):
    index = make(min_recall=0.9)
    index.search(clustered(150, seed=1), K)
    before, measured = index.stats()["recall"], index.upkeep._measured

    def swapped(derived, *arguments):
        monkeypatch.undo()
        measured(derived, *arguments)
        index.current = Derived(index.table, index.metric, LISTS)
        index.current.build()
        return 0.1

    monkeypatch.setattr(index.upkeep, "_measured", swapped)
    monkeypatch.setattr(index.upkeep, "_tuned", lambda *_: (index.current.start, 0.1))
    index.upkeep._changes = 10**6
    index.search(clustered(10, seed=1), K)
    assert index.stats()["recall"] == before
    assert index.current.holds


def test_a_rebuild_that_could_wait_for_itself_is_refused():
    index = make(background=True)
    with (
        index.table.lock.write(),
        pytest.raises(RuntimeError, match=r"rebuild\(\) under table.lock.write\(\) could wait"),
    ):
        index.rebuild()
    index.close()


def test_what_failed_is_tried_again_after_so_many_calls_whatever_the_time(monkeypatch):
    index = make(min_recall=None)
    build, tries = Derived.build, []

    def failing(self, *arguments):
        tries.append(index.upkeep._work())
        if len(tries) == 1:
            raise MemoryError("no room")
        build(self, *arguments)

    monkeypatch.setattr(Derived, "build", failing)
    monkeypatch.setattr("sparsemem.indexes.upkeep.tell", lambda message: None)
    monkeypatch.setattr("sparsemem.indexes.upkeep.PATIENT_CALLS", 900)
    for start in range(12):
        index.update(torch.arange(300), clustered(300, seed=start))
    assert len(tries) >= 2
    assert 900 <= tries[1] - tries[0] <= 1200


def test_an_error_is_gone_from_the_stats_once_it_works_again(monkeypatch, told):
    index = make(buffer_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr(Derived, "absorb", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="upkeep"):
            index.update(torch.arange(20), clustered(20, seed=1))
    assert "division" in index.stats()["error"]
    index.update(torch.arange(20), clustered(20, seed=1))
    assert index.stats()["error"] is None
    told.clear()


def test_trained_anew_after_growth_wear_and_crowding():
    rows = clustered(4000)
    table = RowTable(rows.clone(), torch.arange(4000) < 100)
    index = make_index(LISTS, table, Metric.cosine, background=False, exact_below=50)
    assert index.stats()["rebuilds"] == 1
    index.update(torch.arange(100, 300), rows[100:300])
    assert index.stats()["rebuilds"] == 2  # more than twice the rows
    index.buffer_rows = 1
    index.update(torch.arange(200), rows[:200])
    assert index.stats()["rebuilds"] == 2  # all of them are where they were
    index.update(torch.arange(200), rows[1000:1200])
    assert index.stats()["rebuilds"] == 3  # more than half of them replaced
    index.remove(torch.arange(100, 200))
    assert index.stats()["rebuilds"] == 4  # too many entries of rows that are gone

    index = make(rows=rows, buffer_rows=1)
    before = index.stats()["imbalance"]
    for start in range(0, 1600, 400):  # under the half, but all of them into one list
        ids = torch.arange(start, start + 400)
        index.update(ids, rows[:1] + 0.01 * rows[ids])
    index.upkeep._changes = 10**6
    index.update(torch.arange(1), rows[:1])
    assert index.stats()["rebuilds"] == 2
    assert index.stats()["imbalance"] < 2 * before + 1


def test_without_the_background_runs_are_alike():
    results = []
    for _ in range(2):
        index = make(buffer_rows=30, min_recall=0.9)
        for start in range(0, 500, 50):
            index.update(torch.arange(start, start + 50), clustered(50, seed=start))
            found = index.search(clustered(30, seed=start + 1), K)
        results.append((found, index.stats() | {"age": None}))
    assert torch.equal(results[0][0].ids, results[1][0].ids)
    assert torch.equal(results[0][0].scores, results[1][0].scores)
    assert results[0][1] == results[1][1]


def test_the_background_absorbs():
    index = make(background=True, buffer_rows=50, exact_below=1)
    wait_for(lambda: index.current is not None)
    index.update(torch.arange(80), clustered(80, seed=2))
    wait_for(lambda: index.stats()["buffered"] <= 25)
    assert index.search(clustered(80, seed=2), 1).ids.flatten().tolist() == list(range(80))
    index.close()


def test_checks_that_only_queries_call_for_are_rarer():
    index = make(background=True, min_recall=0.95)
    wait_for(lambda: index.current is not None)
    upkeep = index.upkeep
    index.search(clustered(200, seed=1), K)
    wait_for(lambda: not upkeep._is_new())
    index.sample.seen += 10**6
    assert upkeep._check_due()
    upkeep._rest._took, upkeep._rest._ended = 1.0, time.monotonic() - 5
    assert not upkeep._check_now()
    upkeep._changes = 10**6
    assert upkeep._check_now()
    index.close()


def test_an_index_that_is_dropped_goes_with_its_thread():
    index = make(background=True)
    wait_for(lambda: index.current is not None)
    thread, reference = index.upkeep._worker._thread, weakref.ref(index)
    del index
    for _ in range(200):
        gc.collect()
        if reference() is None and not thread.is_alive():
            break
        time.sleep(0.01)
    assert reference() is None
    assert not thread.is_alive()


def test_rows_that_stay_in_their_lists_call_for_no_check():
    index = make(buffer_rows=10)
    for rows, changes in ((index.table.rows[:40] + 0.001, 0), (clustered(40, seed=9), 20)):
        index.upkeep._changes = 0
        before = index.current.buffer.marked
        index.update(torch.arange(40), rows)
        assert index.upkeep._changes >= changes
        assert index.current.buffer.marked - before == index.upkeep._changes
        assert (index.upkeep._changes == 0) == (changes == 0)
