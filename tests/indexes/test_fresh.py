"""FAISS kinds under change: what is searched and found, and what they say of themselves.

That no kind ever gives a stale row or misses a fresh one is in test_contract.py.
"""

import gc

import numpy as np
import pytest
import torch

import sparsemem.indexes.derived as derived_module
from sparsemem.indexes.derived import Derived
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.factory import make_index
from sparsemem.indexes.kinds import to_faiss
from sparsemem.indexes.metrics import Metric
from tests.oracles.fresh_index import LISTS, K, N, W, agreement, clustered, make, table_of, wait_for

pytestmark = pytest.mark.usefixtures("told")


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
    stats = index.stats()
    assert stats["buffered"] - stats["strays"] <= 20
    assert index.search(far, 1).ids.flatten().tolist() == [0, 1, 2, 3]


def test_lists_change_in_place_and_other_kinds_enter_rows_again():
    rows = clustered(40, seed=3)
    for name, entries in ((LISTS, N), ("HNSW16", N + 40)):
        index = make(name, buffer_rows=1)
        index.update(torch.arange(40), rows)
        assert index.current.entries == entries
        assert index.search(rows, 1).ids.flatten().tolist() == list(range(40))


def test_few_rows_left_are_scanned(monkeypatch):
    index = make(min_recall=None, exact_below=50)
    index.upkeep._failed_after = 10**9  # no rebuild: the entries stay
    index.remove(torch.arange(20, N))

    def fail(*arguments):
        raise AssertionError("the index was asked")

    monkeypatch.setattr(Derived, "found", fail)
    assert agreement(index, clustered(10, seed=1)) == 1.0
    assert index.stats()["exact"]


def test_where_stale_entries_hide_too_much_a_scan_finds_the_rest(monkeypatch):
    monkeypatch.setattr(derived_module, "MOST_CANDIDATES", 64)
    rows = clustered(4000)
    index = make("Flat", rows=rows, min_recall=None, exact_below=1)
    index.upkeep._failed_after = 10**9
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


def test_removing_nearly_all_leaves_the_rest_to_be_found():
    index = make(min_recall=None, exact_below=1)
    rows = index.table.rows.clone()
    index.upkeep._failed_after = 10**9  # no rebuild: the entries stay
    kept = torch.tensor([7, 300, 599])
    gone = torch.ones(N, dtype=torch.bool)
    gone[kept] = False
    index.remove(gone.nonzero().squeeze(1))
    for query in rows[::50]:
        assert sorted(index.search(query.unsqueeze(0), 3).ids[0].tolist()) == kept.tolist()
    assert index.search(rows[:1], 5).ids[0, 3:].tolist() == [-1, -1]


def test_changes_after_close_are_still_found():
    index = make(background=True, buffer_rows=10)
    wait_for(lambda: index.current is not None)
    index.close()
    rows = clustered(100, seed=9)
    index.update(torch.arange(100), rows)
    assert index.search(rows, 1).ids.flatten().tolist() == list(range(100))


def tight(count: int, seed: int) -> torch.Tensor:
    """Rows close to sixteen of the corners of a cube."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).repeat(1, W // 4)
    noise = 0.05 * torch.randn(count, W, generator=generator)
    return corners[torch.randint(16, (count,), generator=generator)] + noise


def test_rows_far_from_all_lists_stay_until_the_lists_are_trained_anew():
    index = make("IVF64,Flat", tight(N, 1), buffer_rows=8, min_recall=None)
    far = torch.eye(W)[:4] - torch.eye(W)[4:]  # as far from all corners as can be
    index.update(torch.arange(4), far)
    index.update(torch.arange(4, 24), tight(20, 2))
    stats = index.stats()
    assert stats["buffered"] - stats["strays"] <= 8
    assert index.current.buffer.holds(np.arange(4)).all()
    index.current.setting = index.current.setting._replace(effort=1)  # found all the same
    assert index.search(far, 1).ids.flatten().tolist() == list(range(4))
    index.update(torch.arange(2), tight(2, 3))  # come home
    index.update(torch.arange(24, 44), tight(20, 4))
    assert index.current.buffer.holds(np.arange(4)).tolist() == [False] * 2 + [True] * 2
    index.remove(torch.tensor([3]))
    assert index.search(far[3:], 1).ids.item() != 3
    index.rebuild()
    assert index.stats()["buffered"] == 0
    assert index.search(far[2:3], 1).ids.item() == 2


def test_too_many_far_rows_are_absorbed_and_call_for_new_lists(monkeypatch):
    index = make("IVF64,Flat", tight(N, 1), buffer_rows=8, min_recall=None)
    monkeypatch.setattr(index.upkeep, "_build", lambda: None)
    far = torch.randn(250, W, generator=torch.Generator().manual_seed(1))
    for start in range(0, 250, 10):
        index.update(torch.arange(start, start + 10), far[start : start + 10])
    assert N / 16 < index.stats()["strays"] <= N / 4 < index.current.absorbed + N / 8
    assert index.upkeep._rebuild_due()
    assert index.search(far, 1).ids.flatten().tolist() == list(range(250))


def test_float64_rows_are_scored_in_float64():
    rows = clustered().double()
    index = make(rows=rows)
    found = index.search(rows[:3], K)
    assert found.scores.dtype == torch.float64
    exact = ExactIndex(index.table, index.metric).search(rows[:3], K)
    torch.testing.assert_close(found.scores, exact.scores, rtol=1e-14, atol=0)
    assert torch.equal(found.scores, index.exact.search(rows[:3], K).scores)


def test_many_centroids_are_looked_up_in_lists():
    faiss = pytest.importorskip("faiss")
    rows = torch.randn(6000, W, generator=torch.Generator().manual_seed(1))
    index = make("IVF1024,Flat", rows=rows, min_recall=0.95)
    assert isinstance(faiss.downcast_index(index.current.faiss.quantizer), faiss.IndexIVFFlat)
    assert agreement(index, torch.randn(100, W)) >= 0.93
    index.buffer_rows = 1
    index.update(torch.arange(500), rows.flip(0)[:500])
    assert index.stats()["buffered"] == index.stats()["strays"] < 10
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


def lists_and_vectors(index, ids):
    """Where rows' entries are, and the vectors that are there."""
    labels = index.current.label_of[ids] - 1
    return index.current.lists.of(labels), index.current.faiss.reconstruct_batch(labels)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", [LISTS, "IVF16,SQ8"])
def test_rows_that_move_little_are_entered_without_a_search_for_their_lists(
    name, kernels, monkeypatch
):
    monkeypatch.setenv("SPARSEMEM_KERNELS", kernels)
    index, ids = make(name, buffer_rows=30, min_recall=None), np.arange(40)
    lists, _ = lists_and_vectors(index, ids)
    rows = index.table.rows[:40] + 0.001 * torch.randn(40, W)

    def fail(vectors):
        raise AssertionError("a search for lists")

    monkeypatch.setattr(index.current.lists, "nearest", fail)
    index.update(torch.arange(20), rows[:20])
    assert index.stats()["buffered"] == 20
    index.update(torch.arange(20, 40), rows[20:])
    assert index.stats()["buffered"] == 0
    now, vectors = lists_and_vectors(index, ids)
    assert np.array_equal(now, lists)
    error = 1e-6 if name == LISTS else 0.02
    np.testing.assert_allclose(vectors, to_faiss(rows, index.metric), atol=error)
    index.current.setting = index.current.setting._replace(effort=16)
    assert agreement(index, rows) == 1.0


def test_rows_that_move_far_wait_for_a_list_of_their_own():
    index = make(buffer_rows=30, min_recall=None)
    index.upkeep._failed_after = 10**9  # no rebuild
    rows, ids = clustered(40, seed=9), np.arange(40)
    index.update(torch.arange(40), rows)
    current = index.current
    assert current.absorbed > 0
    lists, _ = lists_and_vectors(index, ids)
    nearest, _ = current.lists.nearest(to_faiss(rows, index.metric))
    squares = current.lists.squares(to_faiss(rows, index.metric), lists)
    entered = ~current.buffer.holds(ids)
    assert entered.any()
    assert ((lists == nearest) | (squares <= current.lists.usual))[entered].all()


def test_a_row_that_creeps_away_changes_its_list():
    index = make(buffer_rows=1, min_recall=None)
    index.upkeep._failed_after = 10**9  # no rebuild
    everywhere, _ = lists_and_vectors(index, np.arange(N))
    before = everywhere[:2]
    others = [np.flatnonzero(everywhere != own)[0] for own in before]
    start, goal = index.table.rows[:2].clone(), index.table.rows[others].clone()
    for step in range(1, 101):
        index.update(torch.arange(2), torch.lerp(start, goal, step / 100))
    index.current.absorb(2)
    lists, vectors = lists_and_vectors(index, np.arange(2))
    nearest, _ = index.current.lists.nearest(vectors)
    near = index.current.lists.squares(vectors, lists) <= index.current.lists.usual
    assert (lists != before).all()
    assert ((lists == nearest) | near).all()


def test_rows_that_creep_are_found_as_well_as_if_their_lists_were_looked_for_each_time(
    monkeypatch,
):
    def crept():
        index, ids = make(buffer_rows=32, min_recall=None), torch.arange(300)
        index.upkeep._failed_after = 10**9  # no rebuild
        start, goal = index.table.rows[:300].clone(), index.table.rows[300:].clone()
        for step in range(1, 61):
            index.update(ids, torch.lerp(start, goal, step / 60))
        assert index.current.absorbed > 300  # they went from list to list
        index.current.setting = index.current.setting._replace(effort=3)
        return agreement(index, torch.cat([clustered(100, seed=seed) for seed in (0, 7, 8)]))

    settling = crept()
    monkeypatch.setattr(Derived, "settle", lambda self: 0)
    assert settling >= crept() - 0.01


def test_codes_that_take_long_are_left_to_the_background():
    index = make("IVF16,PQ4np", buffer_rows=10_000, min_recall=None)
    index.update(torch.arange(40), index.table.rows[:40] + 0.001)
    index.current.settle()
    assert index.stats()["buffered"] == 40
