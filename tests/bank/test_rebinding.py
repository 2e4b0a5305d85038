"""Keys that were moved or replaced: table, index and counts are derived anew, once."""

import threading

import pytest
import torch
from torch import nn

from sparsemem.bank import MemoryBank
from sparsemem.bank.expiry import ExpirySchedule
from sparsemem.bank.store import RowStore

N, W, THREADS = 12, 3, 4


def replaced(**options):
    """A bank whose keys somebody has just put others in the place of; and those."""
    bank = MemoryBank(N, W, **options)
    bank.append(torch.randn(N, W))
    rows = torch.randn(N, W)
    bank.keys = nn.Parameter(rows.clone())
    return bank, rows


def in_threads(task, count=THREADS):
    """Run a task in threads at once; what each returned."""
    results = [None] * count

    def run(number):
        results[number] = task()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_threads_that_see_it_at_once_derive_it_once(monkeypatch):
    bank, rows = replaced(metric="l2")
    is_bound, derive = RowStore._is_bound, RowStore._derive
    seen, together, derived = threading.local(), threading.Barrier(THREADS), []

    def looked(self):
        bound = is_bound(self)
        if not hasattr(seen, "first"):
            seen.first = bound
            together.wait(20)  # until all have looked
        return bound

    monkeypatch.setattr(RowStore, "_is_bound", looked)
    monkeypatch.setattr(RowStore, "_derive", lambda *a: (derived.append(1), derive(*a)))
    for ids in in_threads(lambda: bank.read(rows, 1).ids.flatten().tolist()):
        assert ids == list(range(N))
    assert len(derived) == 1


def test_a_loaded_state_is_always_derived_anew(monkeypatch):
    bank, other = MemoryBank(N, W), MemoryBank(N, W)
    other.append(torch.randn(5, W))
    bank.load_state_dict(other.state_dict())
    assert bank.stats()["num_live"] == 5
    assert bank.append(torch.randn(1, W)).tolist() == [5]


def test_what_breaks_off_is_derived_at_the_next_call(monkeypatch):
    bank, rows = replaced(metric="l2")
    bank.book.expiry[3] = 50

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ExpirySchedule, "restart", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bank.read(rows, 1)
    assert bank.read(rows, 1).ids.flatten().tolist() == list(range(N))
    assert bank._expiries.next == 50


def test_a_row_whose_time_is_over_is_not_hidden_meanwhile(monkeypatch):
    bank = MemoryBank(N, W)
    bank.append(torch.randn(2, W), ttl=3)
    bank.keys = nn.Parameter(torch.randn(N, W))
    times, restart = [], ExpirySchedule.restart

    def looking(self):
        times.append(bank._expiries.next)  # as another thread would, which needs no lock for it
        restart(self)

    monkeypatch.setattr(ExpirySchedule, "restart", looking)
    bank.read(torch.randn(1, W), 1)
    assert [*times, bank._expiries.next] == [5, 5]


def test_under_the_lock_nobody_waits_for_what_waits_for_the_lock():
    pytest.importorskip("faiss")
    options = {"index": "IVF4,Flat", "exact_below": 64, "buffer_rows": 32, "min_recall": None}
    bank = MemoryBank(400, W, metric="l2", **options)
    bank.append(torch.randn(300, W))
    bank.index.rebuild()
    rows = torch.randn(400, W)

    def replace():
        with bank.table.lock.write():
            bank.write(torch.arange(200), rows[:200])  # more than the buffer: a thread is woken
            bank.keys = nn.Parameter(rows.clone())
            bank.write(torch.arange(200, 400), rows[200:])
        return bank.read(rows, 1).ids.flatten().tolist()

    assert in_threads(replace, 1) == [list(range(400))]
    bank.close()
