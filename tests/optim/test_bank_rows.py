"""A bank's rows under the row optimisers: told, locked, alive; and what a step costs."""

import gc
import resource
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemem import MemoryBank
from sparsemem.optim import RowAdagrad, RowAdam, RowSGD, base
from sparsemem.optim.gradients import make_change
from tests.oracles.row_optimizers import CASES, CLOSE, N, W, make, make_bank, sparse, table


class CountingElements(TorchDispatchMode):
    """The most elements that any operation's result had."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        in_place = isinstance(result, torch.Tensor) and any(result is arg for arg in args)
        if isinstance(result, torch.Tensor) and not in_place and not result.is_sparse:
            self.most = max(self.most, result.numel())
        return result


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("index", ["exact", "IVF16,Flat"])
def test_the_next_search_finds_a_moved_row(kind, index):
    if index != "exact":
        pytest.importorskip("faiss")
    options = {} if index == "exact" else {"background": False, "exact_below": 1}
    bank = MemoryBank(500, W, metric="l2", index=index, **options)
    rows = torch.randn(500, W)
    bank.append(rows)
    if index != "exact":
        bank.index.rebuild()
        assert bank.stats()["exact"] is False
    optimiser = make(kind, bank.parameters(), lr=100.0)
    found = bank.read(rows[7:8], 1)
    assert found.ids.tolist() == [[7]]
    bank.keys.grad = sparse([7], torch.ones(1, W), 500)
    optimiser.step()
    moved = bank.keys[7:8].detach().clone()
    assert (moved - rows[7]).abs().min() > 10
    hit = bank.read(moved, 1)
    assert hit.ids.tolist() == [[7]]
    assert hit.scores.item() == 0
    assert bank.read(rows[7:8], 1).ids.item() != 7
    bank.close()


def test_only_moved_keys_are_told(monkeypatch):
    bank = make_bank(value_width=3)
    told = []
    monkeypatch.setattr(bank, "changed", lambda ids: told.append(ids.tolist()))
    optimiser = RowSGD(bank.parameters())
    bank.keys.grad = sparse([5, 2, 5], torch.randn(3, W, dtype=torch.float64), N)
    bank.values.grad = sparse([1], torch.randn(1, 3, dtype=torch.float64), N)
    optimiser.step()
    assert told == [[2, 5]]


def test_a_durable_bank_is_told_of_keys_and_values():
    class Journal:
        def __init__(self):
            self.ids = []

        def expect_change(self):
            pass

        def touched(self, ids, table):
            self.ids += ids.tolist()

    bank = make_bank(value_width=3)
    bank.journal = Journal()
    bank.keys.grad = sparse([5, 2], torch.randn(2, W, dtype=torch.float64), N)
    bank.values.grad = sparse([1], torch.randn(1, 3, dtype=torch.float64), N)
    RowSGD(bank.parameters()).step()
    assert sorted(bank.journal.ids) == [1, 2, 5]
    bank.journal = None


def test_rows_change_under_the_write_lock(monkeypatch):
    bank, held = make_bank(), []

    def noting(name):
        real = getattr(RowSGD, name)

        def note(self, *args):
            held.append(bank.table.lock._writer is not None)
            return real(self, *args)

        monkeypatch.setattr(RowSGD, name, note)

    noting("_update")
    noting("_launch")
    dense = table()
    optimiser = RowSGD([bank.keys, dense])
    bank.keys.grad = sparse([5], torch.randn(1, W, dtype=torch.float64), N)
    dense.grad = torch.ones_like(dense)
    optimiser.step()
    assert sorted(held) == [False, True]


def test_gradients_are_looked_at_under_the_lock(monkeypatch):
    """Until then, the place of a removed row may be taken, and its gradient with it."""
    bank = make_bank()
    optimiser = RowSGD(bank.parameters())
    held = []

    def look(*named):
        held.append(bank.table.lock._writer is not None)
        return make_change(*named)

    monkeypatch.setattr(base, "make_change", look)
    bank.keys.grad = sparse([5], torch.randn(1, W, dtype=torch.float64), N)
    optimiser.step()
    assert held == [True]


def test_a_reader_is_told_before_anything_changes():
    bank, dense = make_bank(), table()
    before = dense.detach().clone()
    bank.keys.grad = sparse([5], torch.randn(1, W, dtype=torch.float64), N)
    dense.grad = torch.ones_like(dense)
    optimiser = RowSGD([dense, bank.keys])
    with bank.table.lock.read(), pytest.raises(RuntimeError, match="a thread that reads cannot"):
        optimiser.step()
    assert torch.equal(dense, before)
    assert not bank.table.lock._writer


def test_readers_never_see_half_a_step():
    bank = MemoryBank(64, 256, metric="ip", value_width=1)
    ids = bank.append(torch.ones(64, 256), torch.ones(64, 1))
    optimiser = RowSGD(bank.parameters(), lr=1.0)
    queries, torn, stop = torch.randn(2, 256), [], threading.Event()

    def read():
        while not stop.is_set():
            hit = bank.read(queries, 64)
            same = hit.rows == hit.values  # every element of a key equals its value
            if not same.all():
                torn.append(hit.ids[~same.all(-1)])

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(200):
        bank.keys.grad = sparse(ids.tolist(), torch.ones(64, 256), 64)
        bank.values.grad = sparse(ids.tolist(), torch.ones(64, 1), 64)
        optimiser.step()
    stop.set()
    reader.join()
    assert not torn
    assert (bank.keys == -199).all()


def test_product_keys():
    bank = MemoryBank(16, 4, value_width=3, index="product-key", metric="ip", dtype=torch.float64)
    dense = nn.Parameter(bank.keys.detach().clone())
    before = bank.values.detach().clone()
    optimiser, reference = RowAdam(bank.parameters(), lr=0.1), torch.optim.Adam([dense], lr=0.1)
    hit = bank.read(torch.randn(2, 4, dtype=torch.float64), 3)
    (hit.scores.sum() + hit.values.sum()).backward()
    dense.grad = bank.keys.grad.clone()
    optimiser.step()
    reference.step()
    assert dense.grad.any()
    torch.testing.assert_close(bank.keys, dense, **CLOSE)  # two halves, dense gradients
    moved = (bank.values != before).any(1).nonzero().squeeze(1)
    assert torch.equal(moved, hit.ids.unique())
    bank.remove(moved[:1])
    assert optimiser.state[bank.values]["step"].nonzero().squeeze(1).tolist() == moved[1:].tolist()
    assert optimiser.state[bank.keys]["step"] == 1


def test_rows_removed_or_frozen_after_the_backward_pass_are_left_alone():
    bank = make_bank()
    optimiser = RowAdam(bank.parameters())
    bank.keys.grad = sparse([2, 3, 4], torch.ones(3, W, dtype=torch.float64), N)
    before = bank.keys.detach().clone()
    bank.remove(torch.tensor([3]))
    bank.freeze(torch.tensor([4]))
    optimiser.step()
    assert torch.equal((bank.keys != before).any(1).nonzero().squeeze(1), torch.tensor([2]))
    assert not bank.book.live[3]
    assert optimiser.state[bank.keys]["step"].tolist() == [0, 0, 1] + [0] * (N - 3)
    assert 3 not in bank.read(before[3:4], N - 1).ids


def test_a_gradient_is_not_for_the_row_that_took_the_place():
    bank = make_bank()
    optimiser = RowSGD(bank.parameters(), lr=1.0)
    bank.keys.grad = sparse([2, 3], torch.ones(2, W, dtype=torch.float64), N)
    bank.remove(torch.tensor([3]))
    new = torch.randn(1, W, dtype=torch.float64)
    assert bank.append(new).tolist() == [3]
    before = bank.keys.detach().clone()
    optimiser.step()
    assert torch.equal(bank.keys[3:4], new)
    torch.testing.assert_close(bank.keys[2], before[2] - 1, **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "sgd"])
def test_state_of_removed_rows_goes(kind):
    bank = make_bank(value_width=W)
    optimiser = make(kind, bank.parameters())
    for parameter in bank.tables:
        parameter.grad = sparse([2, 3], torch.ones(2, W, dtype=torch.float64), N)
    optimiser.step()
    bank.remove(torch.tensor([3]))
    for parameter in bank.tables:
        assert len(optimiser.state[parameter]) > 0
        for value in optimiser.state[parameter].values():
            assert value[2].all()
            assert not value[3].any()


def test_eviction_forgets_state():
    bank = make_bank()
    optimiser = RowAdagrad(bank.parameters())
    bank.keys.grad = sparse(list(range(N)), torch.ones(N, W, dtype=torch.float64), N)
    optimiser.step()
    (gone,) = bank.append(torch.randn(1, W, dtype=torch.float64)).tolist()
    assert optimiser.state[bank.keys]["sum"].nonzero().squeeze(1).tolist() == [
        i for i in range(N) if i != gone
    ]


def test_a_bank_does_not_keep_its_optimiser():
    bank = make_bank()
    optimiser = RowAdam(bank.parameters())
    assert len(bank._listeners) == 1
    del optimiser
    gc.collect()
    assert len(bank._listeners) == 0


def test_a_dense_gradient_of_a_bank_moves_trainable_rows_only():
    bank = make_bank()
    bank.remove(torch.tensor([1]))
    bank.freeze(torch.tensor([2]))
    before = bank.keys.detach().clone()
    bank.keys.grad = torch.ones_like(bank.keys)
    RowSGD(bank.parameters(), lr=1.0).step()
    expected = before - 1
    expected[[1, 2]] = before[[1, 2]]
    torch.testing.assert_close(bank.keys.detach(), expected, **CLOSE)


@pytest.mark.parametrize("kind", CASES)
def test_cost_follows_what_is_touched(kind):
    num_rows = 100_000
    bank = MemoryBank(num_rows, W)
    bank.append(torch.randn(num_rows, W))
    embedding = nn.Parameter(torch.randn(num_rows, W))
    optimiser = make(kind, [bank.keys, embedding])
    for _ in range(2):  # in the first step state is made
        for parameter in (bank.keys, embedding):
            parameter.grad = sparse([5, 99_000, 5], torch.randn(3, W), num_rows)
        with CountingElements() as counted:
            optimiser.step()
    assert 0 < counted.most < 100


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_follows_what_is_touched():
    num_rows = 20_000_000
    before = resident_bytes()
    bank = MemoryBank(num_rows, 32)  # 2.5 GB, and twice that for the moments
    ids = torch.randint(num_rows, (300,)).unique()
    bank.write(ids, torch.randn(len(ids), 32))
    bank.keys.grad = sparse(ids.tolist(), torch.randn(len(ids), 32), num_rows)
    RowAdam(bank.parameters()).step()
    assert resident_bytes() - before < 100e6


@pytest.mark.parametrize("kind", [RowSGD, torch.optim.SGD])
@pytest.mark.parametrize("change", ["write", "append"])
def test_a_row_written_between_backward_and_step_is_not_stepped(kind, change):
    bank = MemoryBank(4, 3, 2)
    bank.append(torch.randn(4, 3), torch.randn(4, 2))
    optimiser = kind(bank.parameters(), lr=1.0)
    hit = bank.read(torch.randn(2, 3), 4)
    (hit.scores.sum() + hit.values.sum()).backward()
    rows, values = torch.randn(1, 3), torch.randn(1, 2)
    if change == "write":
        ids = torch.tensor([2])
        bank.write(ids, rows, values)
    else:
        bank.remove(torch.tensor([1]))
        ids = bank.append(rows, values)
    before = bank.keys.detach().clone()
    optimiser.step()
    assert torch.equal(bank.keys[ids], rows)
    assert torch.equal(bank.values[ids], values)
    others = [row for row in range(4) if row != int(ids)]
    assert (bank.keys[others] != before[others]).any(1).all()
