"""FAISS kinds under change: what is searched, when it is built anew, what it says of itself.

That no kind ever gives a stale row or misses a fresh one is in test_contract.py.
"""

import gc
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch

import sparsemem.indexes.derived as derived_module
from sparsemem.indexes.derived import Derived
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.recall import recall
from sparsemem.indexes.table import RowTable

# Upkeep that fails is told by a warning: none is to be overlooked.
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

N, W, K = 600, 8, 5
LISTS = "IVF16,Flat"


def clustered(count: int = N, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, W, generator=generator)
    which = torch.randint(20, (count,), generator=generator)
    return centres[which] + 0.3 * torch.randn(count, W, generator=generator)


def table_of(rows: torch.Tensor) -> RowTable:
    return RowTable(rows.clone(), torch.ones(len(rows), dtype=torch.bool))


def make(name=LISTS, rows=None, **options):
    options = {"background": False, "exact_below": 50, **options}
    return make_index(
        name, table_of(clustered() if rows is None else rows), Metric.cosine, **options
    )


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def agreement(index, queries, k=K) -> float:
    truth = ExactIndex(index.table, index.metric).search(queries, k)
    return recall(index.search(queries, k), truth, index.metric)


def test_below_its_size_it_scans():
    index = make(exact_below=N + 1)
    assert index.stats()["exact"]
    assert index.stats()["rebuilds"] == 0
    assert agreement(index, clustered(20, seed=1)) == 1.0


@pytest.mark.parametrize("name", [LISTS, "HNSW16", "Flat", "IVF16,SQ8", "PCA4,IVF16,Flat"])
def test_holds_its_floor_on_clustered_rows(name):
    index = make(name, min_recall=0.9)
    assert not index.stats()["exact"]
    index.search(clustered(150, seed=1), K)  # queries unlike the rows: it is tuned for them now
    assert agreement(index, clustered(60, seed=1)) >= 0.9


@pytest.mark.parametrize("name", [LISTS, "HNSW16"])
def test_a_changed_row_is_found_before_and_after_it_is_absorbed(name):
    index = make(name, buffer_rows=20)
    far = 10 * torch.eye(W)[:4] - 3
    index.update(torch.arange(4), far)
    assert index.stats()["buffered"] == 4
    assert index.search(far, 1).ids.flatten().tolist() == [0, 1, 2, 3]
    for start in range(100, 400, 10):
        index.update(torch.arange(start, start + 10), clustered(10, seed=start))
    assert index.stats()["buffered"] <= 20
    assert index.search(far, 1).ids.flatten().tolist() == [0, 1, 2, 3]


def test_lists_change_in_place_and_other_kinds_enter_rows_again():
    rows = clustered(40, seed=3)
    for name, entries in ((LISTS, N), ("HNSW16", N + 40)):
        index = make(name, buffer_rows=1)
        index.update(torch.arange(40), rows)
        assert index.current.entries == entries
        assert index.search(rows, 1).ids.flatten().tolist() == list(range(40))


@pytest.mark.parametrize(("name", "method"), [(LISTS, "update_vectors"), ("Flat", "add")])
def test_an_interrupted_absorption_leaves_the_truth(name, method, monkeypatch):
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


def test_a_failing_build_in_the_background_is_told_and_does_not_stop_searches(monkeypatch):
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
        index.current.absorbed += 1  # as if rows drifted
        index.search(queries[number : number + 8], K)
    assert tuned / 2 <= index.stats()["effort"] <= 16
    assert index.stats()["recall"] > 0.97  # no check was due in between
    assert agreement(index, queries) >= 0.95


def test_a_floor_out_of_reach_ends_in_exact_search():
    with pytest.warns(UserWarning, match=r"'LSH' reaches a recall of 0\.\d+ at most"):
        index = make("LSH", rows=clustered(5000), min_recall=1.0)
    assert index.stats()["exact"]
    assert agreement(index, clustered(20, seed=1)) == 1.0


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
        index.current.absorbed += 1
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


def test_few_rows_left_are_scanned(monkeypatch):
    index = make(min_recall=None, exact_below=50)
    index.upkeep._failed_at = time.monotonic()  # no rebuild: the entries stay
    index.remove(torch.arange(20, N))

    def fail(*arguments):
        raise AssertionError("the index was asked")

    monkeypatch.setattr(Derived, "candidates", fail)
    assert agreement(index, clustered(10, seed=1)) == 1.0
    assert index.stats()["exact"]


def test_where_stale_entries_hide_too_much_a_scan_finds_the_rest(monkeypatch):
    monkeypatch.setattr(derived_module, "MOST_CANDIDATES", 64)
    rows = clustered(4000)
    index = make("Flat", rows=rows, min_recall=None, exact_below=1)
    index.upkeep._failed_at = time.monotonic()
    near = index.search(rows[:1], 1500).ids[0, :1400]
    index.remove(near)
    assert agreement(index, rows[:1]) == 1.0
    assert index.stats()["scans"] > 0


def test_the_same_row_told_twice_is_found_once():
    index = make(min_recall=None)
    index.changed(torch.tensor([3, 3]))
    assert index.search(index.table.rows[3:4], 3).ids[0].unique().numel() == 3


def test_refined_codes_take_the_effort_too():
    index = make("IVF16,PQ4np,RFlat", min_recall=None)
    assert agreement(index, clustered(20, seed=1)) > 0.3
    index.current.setting = index.current.setting._replace(effort=16)
    assert agreement(index, clustered(20, seed=1)) > 0.9


def test_an_error_is_gone_from_the_stats_once_it_works_again(monkeypatch):
    index = make(buffer_rows=10)
    with monkeypatch.context() as patch:
        patch.setattr(Derived, "absorb", lambda *_: 1 / 0)
        with pytest.warns(UserWarning, match="upkeep"):
            index.update(torch.arange(20), clustered(20, seed=1))
    assert "division" in index.stats()["error"]
    index.update(torch.arange(20), clustered(20, seed=1))
    assert index.stats()["error"] is None


def test_trained_anew_after_growth_wear_and_crowding():
    rows = clustered(4000)
    table = RowTable(rows.clone(), torch.arange(4000) < 100)
    index = make_index(LISTS, table, Metric.cosine, background=False, exact_below=50)
    assert index.stats()["rebuilds"] == 1
    index.update(torch.arange(100, 300), rows[100:300])
    assert index.stats()["rebuilds"] == 2  # more than twice the rows
    index.buffer_rows = 1
    index.update(torch.arange(160), rows[:160])
    assert index.stats()["rebuilds"] == 3  # more than half of them replaced
    index.remove(torch.arange(100, 200))
    assert index.stats()["rebuilds"] == 4  # too many entries of rows that are gone

    index = make(rows=rows, buffer_rows=1)
    before = index.stats()["imbalance"]
    for start in range(0, 1600, 400):  # under the half, but all of them into one list
        ids = torch.arange(start, start + 400)
        index.update(ids, torch.ones(400, W) + 0.01 * rows[ids])
    index.upkeep._changes = 10**6
    index.update(torch.arange(1), rows[:1])
    assert index.stats()["rebuilds"] == 2
    assert index.stats()["imbalance"] < 2 * before + 1


def test_removing_nearly_all_leaves_the_rest_to_be_found():
    index = make(min_recall=None, exact_below=1)
    rows = index.table.rows.clone()
    index.upkeep._failed_at = time.monotonic()  # no rebuild: the entries stay
    kept = torch.tensor([7, 300, 599])
    gone = torch.ones(N, dtype=torch.bool)
    gone[kept] = False
    index.remove(gone.nonzero().squeeze(1))
    for query in rows[::50]:
        assert sorted(index.search(query.unsqueeze(0), 3).ids[0].tolist()) == kept.tolist()
    assert index.search(rows[:1], 5).ids[0, 3:].tolist() == [-1, -1]


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


def test_changes_after_close_are_still_found():
    index = make(background=True, buffer_rows=10)
    wait_for(lambda: index.current is not None)
    index.close()
    rows = clustered(100, seed=9)
    index.update(torch.arange(100), rows)
    assert index.search(rows, 1).ids.flatten().tolist() == list(range(100))


def test_float64_rows_are_scored_in_float64():
    rows = clustered().double()
    index = make(rows=rows)
    found = index.search(rows[:3], K)
    assert found.scores.dtype == torch.float64
    exact = ExactIndex(index.table, index.metric).search(rows[:3], K)
    assert torch.equal(found.scores, exact.scores)


def test_many_centroids_are_looked_up_in_lists():
    faiss = pytest.importorskip("faiss")
    rows = torch.randn(6000, W, generator=torch.Generator().manual_seed(1))
    index = make("IVF1024,Flat", rows=rows, min_recall=0.95)
    assert isinstance(faiss.downcast_index(index.current.faiss.quantizer), faiss.IndexIVFFlat)
    assert agreement(index, torch.randn(100, W)) >= 0.93
    index.buffer_rows = 1
    index.update(torch.arange(500), rows.flip(0)[:500])
    assert index.stats()["buffered"] == 0
    # Rows 5999, 5998, ... now have two places each, and the lower one comes first.
    assert index.search(rows.flip(0)[:500], 1).ids.flatten().tolist() == list(range(500))
    del index
    gc.collect()  # the centroids' two indices are freed once each


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("IVF16,Flatt", {}, "index is 'IVF16,Flatt', expected 'exact', 'product-key' or a FAISS"),
        ("IVF16,PQ3", {}, "that suits rows of width 8, such as 'IVF4096,Flat'"),
        ("IDMap,Flat", {}, "index is 'IDMap,Flat', expected one without IDMap"),
        (LISTS, {"buffer_row": 3}, "unknown option 'buffer_row' of index 'IVF16,Flat': did you"),
        ("exact", {"min_recall": 0.5}, "unknown option 'min_recall' of index 'exact'"),
        (LISTS, {"min_recall": 1.5}, "min_recall is 1.5, expected a number from 0 to 1"),
        (LISTS, {"buffer_rows": 0}, "buffer_rows is 0, expected at least 1"),
    ],
)
def test_wrong_names_and_options_are_refused(name, options, message, plain_errors):
    with pytest.raises(ValueError, match=message):
        make_index(name, table_of(clustered(20)), Metric.cosine, **options)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"this index needs FAISS: install sparsemem\[cpu\]"):
        make_index(LISTS, table_of(clustered(20)), Metric.cosine)


def test_stats_are_of_this_moment():
    index = make(buffer_rows=100)
    index.update(torch.arange(10), clustered(10, seed=1))
    stats = index.stats()
    assert stats["index"] == LISTS
    assert stats["buffered"] == 10
    assert stats["rebuilds"] == 1
    assert 0 <= stats["age"] < 60
    assert stats["imbalance"] >= 1
    assert stats["bytes"] > N * W * 4
    sizes = [index.current.faiss.invlists.list_size(i) for i in range(16)]
    assert stats["imbalance"] == pytest.approx(16 * np.square(sizes).sum() / N**2)
