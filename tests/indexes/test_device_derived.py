"""Indices kept on the device of their rows: with FAISS on a CPU in the place of FAISS GPU, or it.

That nothing stale surfaces and nothing fresh is missed is in test_contract.py as well.
"""

import contextlib
import threading
from random import Random

import pytest
import torch

from sparsemem.indexes.device_derived import DeviceDerived
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.recall import recall
from tests.oracles.device_index import agreement, first, ids_of, make
from tests.oracles.fresh_index import LISTS, K, N, W, clustered, wait_for
from tests.oracles.synchronisations import Synchronisations

faiss = pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("told", "device_engine")
NAMES = [LISTS, "IVF16,SQ8", "Flat"]


@pytest.fixture(params=["cpu", "kernels", pytest.param("cuda", marks=pytest.mark.gpu)])
def any_device(request, monkeypatch):
    """Also the CPU with Triton's kernels, in their interpreter, which is slow."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if request.param == "kernels":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled here")
        request.getfixturevalue("_triton")
        monkeypatch.setenv("SPARSEMEM_KERNELS", "triton")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.mark.parametrize("name", [*NAMES, "IVF16,SQfp16", "IVF4,PQ4np"])
def test_everything_is_on_the_device_and_near_the_truth(name, device):
    index = make(device, name, rows=clustered(3000), min_recall=0.9)
    current = index.current
    assert isinstance(current, DeviceDerived)
    assert current.entries == 3000
    assert {current.label_of.device.type, current.row_of.device.type} == {device.type}
    stats = index.stats()
    assert not stats["exact"]
    assert stats["error"] is None
    assert stats["imbalance"] >= 1
    assert stats["bytes"] > 3000 * 8
    index.search(clustered(150, seed=1).to(device), K)  # it is tuned for queries like these
    assert agreement(index, clustered(60, seed=1)) >= 0.9
    assert index.search(clustered(3).to(device), K).ids.device.type == device.type


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_row_is_found_before_and_after_it_is_absorbed(name, device):
    index = make(device, name, buffer_rows=20)
    far = (10 * torch.eye(W)[:4] - 3).to(device)
    index.update(ids_of(0, 4, device), far)
    assert index.stats()["buffered"] == 4
    assert first(index, far) == [0, 1, 2, 3]
    for start in range(100, 400, 10):
        rows = clustered(10, seed=start).to(device)
        index.update(ids_of(start, start + 10, device), rows)
        assert first(index, rows) == list(range(start, start + 10))
    stats = index.stats()
    assert stats["buffered"] - stats["strays"] <= 20
    assert index.current.entries > N
    assert first(index, far) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", NAMES)
def test_removed_rows_are_not_found_again(name, device):
    index = make(device, name, buffer_rows=5)
    index.upkeep._failed_after = 10**9  # no rebuild: the entries stay
    rows = index.table.rows.clone()
    index.update(ids_of(0, 20, device), rows[:20])
    index.remove(ids_of(10, 60, device))
    found = index.search(rows[:80], 20).ids
    assert not set(range(10, 60)) & set(found.flatten().tolist())
    assert agreement(index, rows[:80].cpu()) > 0.9
    index.update(ids_of(10, 12, device), rows[10:12])
    assert first(index, rows[10:12]) == [10, 11]


def test_where_stale_entries_hide_too_much_a_scan_finds_the_rest(any_device, monkeypatch):
    monkeypatch.setattr("sparsemem.indexes.device_derived.MOST", 64)
    rows = clustered(4000)
    index = make(any_device, "Flat", rows=rows, exact_below=1)
    index.upkeep._failed_after = 10**9
    near = index.search(rows[:1].to(any_device), 1500).ids[0, :1400]
    scans = index.stats()["scans"]
    index.remove(near)
    assert agreement(index, rows[:1]) == 1.0
    assert index.stats()["scans"] == scans + 1


def test_buffered_rows_that_are_better_than_what_is_hidden_need_no_scan(any_device):
    rows = clustered(2000)
    index = make(any_device, "Flat", rows=rows, buffer_rows=1000)
    hot = index.search(rows[:1].to(any_device), 200).ids[0]
    index.update(hot, index.table.rows[hot])  # their old entries are no longer valid
    assert agreement(index, rows[:1]) == 1.0
    assert index.stats()["scans"] == 0


def test_more_than_faiss_can_give_is_scanned(any_device):
    index = make(any_device, rows=clustered(2500))
    assert agreement(index, clustered(2, seed=1), 2300) == 1.0
    assert index.stats()["scans"] == 1


def test_a_larger_k_than_there_are_rows(any_device):
    index = make(any_device)
    found = index.search(clustered(2, seed=1).to(any_device), N + 3)
    assert (found.ids[:, :N].sort(1).values == torch.arange(N, device=any_device)).all()
    assert (found.ids[:, N:] == -1).all()


def test_stale_entries_call_for_new_lists(any_device):
    index = make(any_device, buffer_rows=10)
    for start in range(0, 300, 50):
        index.update(
            ids_of(start, start + 50, any_device), clustered(50, seed=start).to(any_device)
        )
    assert index.stats()["rebuilds"] == 2
    assert index.current.entries < N + 200
    for start in range(0, 300, 50):
        assert first(index, clustered(50, seed=start)) == list(range(start, start + 50))


def test_rows_that_change_all_the_time_stay_in_the_buffer(any_device):
    index = make(any_device, buffer_rows=50)
    for step in range(60):
        rows = clustered(10, seed=step).to(any_device)
        index.update(ids_of(0, 10, any_device), rows)
    assert index.current.entries == N
    assert index.stats()["buffered"] == 10
    assert first(index, rows) == list(range(10))


def test_rows_that_are_told_again_and_again_call_for_few_checks(device, monkeypatch):
    monkeypatch.setattr("sparsemem.indexes.upkeep.CHECK_ROWS", 300)
    index = make(device, rows=clustered(3000), min_recall=0.9)
    assert index.takes_repeats
    index.search(clustered(100, seed=1).to(device), K)
    checks, truth = [], index.upkeep._truth
    monkeypatch.setattr(index.upkeep, "_truth", lambda some: checks.append(some) or truth(some))
    index.search(clustered(100, seed=1).to(device), K)
    told = ids_of(0, 10, device).repeat(20)
    for _ in range(40):  # 8,000 entries, 400 changes at most
        with index.table.lock.write():
            index.changed(told)
    assert len(checks) <= 1
    assert index.current.buffer.marked <= 400 + 200
    assert index.current.buffer.count <= 2 * 200  # and the log is tidied in time
    with index.table.lock.write():  # while rows that are told once call for as many as ever
        index.changed(ids_of(0, 1500, device))
    assert len(checks) == 2


def test_rows_told_again_during_a_build_are_not_settled_twice(device, monkeypatch):
    monkeypatch.setattr("sparsemem.indexes.upkeep.CHECK_ROWS", 10**6)
    index = make(device, rows=clustered(3000), min_recall=0.9)
    told, real = ids_of(0, 10, device).repeat(20), DeviceDerived.build

    def slow(self, stopped):
        real(self, stopped)
        index.changed(told)  # the old index knows of it, too

    monkeypatch.setattr(DeviceDerived, "build", slow)
    index.rebuild()
    before = index.upkeep._changes
    assert before >= 200
    current = index.current
    current.tidy()
    index.upkeep._settle_rows(current)
    assert index.upkeep._changes == before
    assert index.upkeep._watched_at <= current.buffer.marked


class Interrupted:
    """A FAISS index that runs out of memory when half of what it is to add is in."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)

    def add_with_ids_c(self, count, vectors, labels):
        self.real.add_with_ids_c(count // 2, vectors, labels)
        raise MemoryError("no room")


def test_a_failing_call_leaves_the_truth_and_gives_no_label_twice(any_device, told):
    index = make(any_device, buffer_rows=10)
    engine, rows = index.current.engine, clustered()[200:230].to(any_device)
    engine._index = Interrupted(engine._index)
    with pytest.warns(UserWarning, match=r"upkeep of index 'IVF16,Flat': MemoryError\('no room'\)"):
        index.update(ids_of(0, 30, any_device), rows)
    assert index.stats()["buffered"] == 30
    assert first(index, rows) == list(range(30))
    engine._index = engine._index.real
    index.update(ids_of(0, 5, any_device), rows[:5])
    assert index.stats()["buffered"] <= 5
    found = index.search(rows, 20).ids
    assert found[:, 0].tolist() == list(range(30))
    assert all(len(set(ids)) == 20 for ids in found.tolist())
    told.clear()


def test_changes_during_a_build_are_found_before_and_after_the_swap(device, monkeypatch):
    index = make(device, background=True, exact_below=N + 1)
    index.exact_below = 1
    real, reached, go_on = DeviceDerived.build, threading.Event(), threading.Event()

    def slow(self, stopped):
        real(self, stopped)
        reached.set()
        assert go_on.wait(20)

    monkeypatch.setattr(DeviceDerived, "build", slow)
    index.upkeep._worker.wake()
    assert reached.wait(20)
    rows = clustered(30, seed=5).to(device)
    index.update(ids_of(0, 30, device), rows)
    index.remove(ids_of(30, 40, device))
    assert first(index, rows) == list(range(30))
    go_on.set()
    wait_for(lambda: index.stats()["rebuilds"] == 1)
    assert not index.stats()["exact"]
    assert first(index, rows) == list(range(30))
    seen = index.search(clustered(200, seed=6).to(device), 20).ids
    assert not set(range(30, 40)) & set(seen.flatten().tolist())
    index.close()


def test_a_batch_that_another_thread_overtook_waits_on(any_device):
    index = make(any_device, buffer_rows=1000)
    rows = clustered()[100:130].to(any_device)
    index.update(ids_of(0, 30, any_device), rows)
    current = index.current
    prepared = current.prepare(current.begin(20))
    current.absorb(10)
    current.finish(prepared)
    assert current.entries == N + 10
    assert index.stats()["buffered"] == 20
    current.absorb(30)
    assert current.entries == N + 30
    assert first(index, rows) == list(range(30))  # and 100 .. 129: the lower ones come first


@pytest.mark.parametrize("metric", Metric)
def test_random_work_against_a_scan(metric, device):
    random, index = Random(3), make(device, "IVF4,Flat", metric=metric, buffer_rows=30)
    exact = ExactIndex(index.table, metric)
    for step in range(40):
        ids = torch.tensor(random.sample(range(N), 15), device=device)
        rows = clustered(15, seed=step).to(device)
        if step % 4 == 3:
            index.remove(ids)
        else:
            index.update(ids, rows)
        queries = clustered(20, seed=step + 100).to(device)
        found, truth = index.search(queries, K), exact.search(queries, K)
        assert index.table.live[found.ids].all()
        assert recall(found, truth, metric) > 0.999  # all lists are probed
        assert metric is Metric.ip or first(index, rows) == ids.tolist() or step % 4 == 3
        own = metric.scores(queries, index.table.take(found.ids))
        torch.testing.assert_close(found.scores, own, rtol=1e-6, atol=1e-6)


def test_runs_are_alike():
    device, results = "cpu", []
    for _ in range(2):
        index = make(device, buffer_rows=30, min_recall=0.9)
        for start in range(0, 500, 50):
            ids = ids_of(start, start + 50, device)
            index.update(ids, clustered(50, seed=start).to(device))
            found = index.search(clustered(30, seed=start + 1).to(device), K)
        results.append((found, index.stats() | {"age": None}))
    assert torch.equal(results[0][0].ids, results[1][0].ids)
    assert torch.equal(results[0][0].scores, results[1][0].scores)
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_are_scored_as_they_are(dtype, any_device):
    index = make(any_device, rows=clustered().to(dtype))
    queries = index.table.rows[:3].to(index.table.dtype)
    found = index.search(queries, K)
    assert found.scores.dtype == index.table.dtype
    exact = ExactIndex(index.table, index.metric).search(queries, K)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found.scores, exact.scores, rtol=tolerance, atol=tolerance)


def test_readers_side_by_side_beside_a_writer(device):
    index = make(device, rows=clustered(2000), background=True, buffer_rows=40)
    wait_for(lambda: index.current is not None)
    errors, stop = [], threading.Event()
    index.remove(ids_of(1000, 1100, device))

    def read(seed):
        with contextlib.ExitStack() as stack:
            if device.type == "cuda" and seed % 2:  # with a stream of its own
                stack.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
            while not stop.is_set():
                queries = clustered(16, seed=seed).to(device)
                ids = index.search(queries, K).ids.tolist()
                if any(len(set(row)) < K or set(row) & set(range(1000, 1100)) for row in ids):
                    errors.append(ids)
                    return

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for step in range(20):
        rows = clustered(20, seed=step).to(device)
        index.update(ids_of(20 * step, 20 * step + 20, device), rows)
        assert first(index, rows) == list(range(20 * step, 20 * step + 20))
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert index.stats()["error"] is None
    index.close()


@contextlib.contextmanager
def nothing_waits(device):
    """Fails where an operation of torch has the host wait for the device."""
    with Synchronisations() as waits, torch.no_grad():
        before = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode(before)
    assert waits.found == []


def test_what_a_search_and_a_change_wait_for(any_device):
    index = make(any_device, buffer_rows=500)
    index.update(ids_of(0, 20, any_device), clustered(20, seed=1).to(any_device))
    current, queries, ids = (
        index.current,
        clustered(30, seed=2).to(any_device),
        ids_of(0, 20, any_device),
    )
    with nothing_waits(any_device):
        current.found(queries, K)
    with nothing_waits(any_device):
        index.changed(ids)
    with Synchronisations() as waits, torch.no_grad():
        index._search(queries, K)
    assert waits.found == ["_local_scalar_dense"]  # whether a query is to be scanned


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["IVF256,Flat", "IVF256,SQ8"])
def test_recall_of_many_rows_on_cuda(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    generator = torch.Generator(device="cuda").manual_seed(1)
    centres = torch.randn(1000, 32, generator=generator, device="cuda")

    def some(count):
        which = torch.randint(1000, (count,), generator=generator, device="cuda")
        return centres[which] + 0.3 * torch.randn(count, 32, generator=generator, device="cuda")

    index = make("cuda", name, rows=some(100_000), exact_below=1, min_recall=0.95)
    for _ in range(4):
        index.search(some(256), 8)
    assert not index.stats()["exact"]
    assert agreement(index, some(500), 8) >= 0.95
    ids, rows = torch.randperm(100_000, device="cuda")[:30_000], some(30_000)
    for part, new in zip(ids.split(5000), rows.split(5000), strict=True):
        index.update(part, new)
    assert index.current.entries > 100_000
    assert torch.equal(index.search(rows[::10], 1).ids.flatten(), ids[::10])
    index.remove(ids[:1000])
    assert not torch.isin(index.search(rows[:1000], 8).ids, ids[:1000]).any()
    assert agreement(index, some(500), 8) >= 0.95
    assert index.stats()["error"] is None
