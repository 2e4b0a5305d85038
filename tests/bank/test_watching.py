"""torch's own optimisers on a bank's parameters: the index is told of every row they move."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from sparsemem import MemoryBank
from sparsemem.bank.watching import moved_rows
from sparsemem.optim import RowSGD
from tests.oracles.row_optimizers import sparse

N, W = 40, 5
OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=5.0),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=5.0, momentum=0.9),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=5.0, momentum=0.9, nesterov=True),
    "sparse-adam": lambda parameters: torch.optim.SparseAdam(parameters, lr=5.0),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=5.0),
    "row-sgd": lambda parameters: RowSGD(parameters, lr=5.0),
}


class Spied:
    """A bank that notes which rows its index is told of, and which of its rows really moved."""

    def __init__(self, monkeypatch, **options):
        self.bank = MemoryBank(N, W, **options)
        self.bank.append(torch.randn(N, W))
        self.told = []
        real = self.bank.index.changed
        monkeypatch.setattr(
            self.bank.index, "changed", lambda ids: (self.told.append(ids.tolist()), real(ids))
        )

    def step(self, optimiser, ids=None, gradient=None):
        """Rows told in the step, and rows moved."""
        self.told.clear()
        before = self.bank.keys.detach().clone()
        if gradient is None:
            gradient = sparse(ids, torch.randn(len(ids), W), N)
        self.bank.keys.grad = gradient
        optimiser.step()
        moved = (self.bank.keys != before).any(1).nonzero().squeeze(1).tolist()
        return [i for ids in self.told for i in ids], moved


@pytest.mark.parametrize("name", OPTIMISERS)
# The bank warns of changes that nobody told of; torch warns of sparse tensors of its own making.
@pytest.mark.filterwarnings("error:keys were changed:UserWarning")
def test_told_of_exactly_the_rows_that_moved(name, monkeypatch):
    spied = Spied(monkeypatch)
    optimiser = OPTIMISERS[name](spied.bank.parameters())
    for ids in ([3, 7, 3], [7, 30], [], [1]):
        told, moved = spied.step(optimiser, ids)
        assert sorted(told) == moved
        assert set(moved) >= set(ids)
        spied.bank.read(torch.randn(2, W), 3)


def test_momentum_moves_rows_that_have_no_gradient(monkeypatch):
    spied = Spied(monkeypatch)
    optimiser = OPTIMISERS["momentum"](spied.bank.parameters())
    spied.step(optimiser, [3, 7])
    assert spied.step(optimiser, [9]) == ([3, 7, 9], [3, 7, 9])


@pytest.mark.parametrize("name", ["momentum", "nesterov"])
@pytest.mark.parametrize("table", ["keys", "values"])
def test_momentum_moves_no_frozen_and_no_other_row(name, table):
    bank = MemoryBank(N, W, W)
    bank.append(torch.randn(N, W), torch.randn(N, W))
    parameter = getattr(bank, table)
    optimiser = OPTIMISERS[name]([parameter])

    def moved(ids):
        before = parameter.detach().clone()
        parameter.grad = sparse(ids, torch.ones(len(ids), W), N)
        optimiser.step()
        return (parameter != before).any(1).nonzero().squeeze(1).tolist()

    assert moved([3, 4, 5, 6, 7]) == [3, 4, 5, 6, 7]
    bank.freeze(torch.tensor([3]))
    bank.remove(torch.tensor([4]))
    bank.write(torch.tensor([5]), torch.ones(1, W), torch.ones(1, W))  # another row now
    assert moved([9]) == [6, 7, 9]
    bank.unfreeze(torch.tensor([3]))
    assert moved([]) == [6, 7, 9]  # it does not go on with what it had
    bank.read(bank.keys[6:7].detach(), 1)
    assert bank.select(top=1).tolist() == [6]
    assert moved([]) == [6]


def test_momentum_of_the_other_rows_is_as_without_a_bank():
    bank, plain = MemoryBank(N, W), nn.Parameter(torch.randn(N, W))
    bank.append(plain.detach().clone())
    optimisers = [OPTIMISERS["momentum"]([each]) for each in (bank.keys, plain)]
    bank.freeze(torch.tensor([0]))
    for ids in ([3, 7, 3], [5], [3]):
        gradient = sparse(ids, torch.randn(len(ids), W), N)
        for parameter, optimiser in zip((bank.keys, plain), optimisers, strict=True):
            parameter.grad = gradient.clone()
            optimiser.step()
        bank.append(torch.randn(0, W))  # the clock goes on
    assert torch.equal(bank.keys, plain)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_rows_frozen_after_the_backward_pass_are_not_stepped(name, monkeypatch):
    spied = Spied(monkeypatch)
    gradient = sparse([3, 7], torch.ones(2, W), N)
    spied.bank.freeze(torch.tensor([3]))
    optimiser = OPTIMISERS[name](spied.bank.parameters())
    assert spied.step(optimiser, gradient=gradient) == ([7], [7])


@pytest.mark.parametrize("name", ["sgd", "momentum", "sparse-adam", "adagrad"])
def test_the_next_search_finds_moved_rows(name):
    pytest.importorskip("faiss")
    bank = MemoryBank(500, W, metric="l2", index="IVF16,Flat", background=False, exact_below=1)
    bank.append(torch.randn(500, W))
    bank.index.rebuild()
    optimiser = OPTIMISERS[name](bank.parameters())
    for ids in ([3, 7], [7, 100]):
        optimiser.zero_grad()
        bank.gather(torch.tensor(ids)).sum().backward()
        optimiser.step()
    ids = torch.tensor([3, 7, 100])
    hit = bank.read(bank.gather(ids).detach(), 1)
    assert hit.ids.squeeze(1).tolist() == ids.tolist()
    assert not hit.scores.any()
    bank.close()


def test_removed_rows_are_not_told(monkeypatch):
    spied = Spied(monkeypatch)
    optimiser = OPTIMISERS["sgd"](spied.bank.parameters())
    spied.bank.remove(torch.tensor([3]))
    told, _ = spied.step(optimiser, [3, 7])
    assert told == [7]
    assert 3 not in spied.bank.read(torch.randn(1, W), N - 1).ids


def test_a_dense_gradient_means_all_rows(monkeypatch):
    spied = Spied(monkeypatch)
    optimiser = OPTIMISERS["sgd"](spied.bank.parameters())
    told, moved = spied.step(optimiser, gradient=torch.ones(N, W))
    assert told == moved == list(range(N))


def test_an_unknown_optimiser_means_all_rows(monkeypatch):
    class Restless(torch.optim.Optimizer):
        """Moves a row that nothing tells of."""

        def __init__(self, parameters):
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure=None):
            self.param_groups[0]["params"][0][11] += 1

    spied = Spied(monkeypatch)
    told, moved = spied.step(Restless(spied.bank.parameters()), [3])
    assert moved == [11]
    assert told == list(range(N))


def test_an_optimiser_that_tells_banks_itself_is_not_watched(monkeypatch):
    class Telling(torch.optim.SGD):
        tells_banks = True

    spied = Spied(monkeypatch)
    told, moved = spied.step(Telling(spied.bank.parameters(), lr=1.0), [3])
    assert (told, moved) == ([], [3])


def test_values_are_for_the_journal_only(monkeypatch):
    class Journal:
        ids = ()

        def expect_change(self):
            assert self.ids == ()

        def touched(self, ids, table):
            assert table is spied.bank.values
            self.ids = (*self.ids, *ids.tolist())

    spied = Spied(monkeypatch, value_width=3)
    spied.bank.journal = Journal()
    optimiser = torch.optim.SGD(spied.bank.parameters(), lr=1.0)
    spied.bank.values.grad = sparse([4, 4, 8], torch.ones(3, 3), N)
    optimiser.step()
    assert spied.told == []
    assert spied.bank.journal.ids == (4, 8)
    spied.bank.journal = None


def test_parameters_that_were_not_stepped_are_not_told(monkeypatch):
    spied = Spied(monkeypatch)
    other = nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    optimiser = torch.optim.SGD([*spied.bank.parameters(), other], lr=1.0)
    optimiser.step()
    assert spied.told == []


def test_moved_rows_of_a_plain_table():
    table = nn.Parameter(torch.zeros(6, 2))
    optimiser = torch.optim.SGD([table], lr=1.0)
    table.grad = sparse([4, 1, 4], torch.ones(3, 2), 6)
    assert moved_rows(optimiser, table).tolist() == [1, 4]
    table.grad = torch.ones(6, 2)
    assert moved_rows(optimiser, table).tolist() == list(range(6))


def test_watched_once_and_only_where_there_are_banks(repository):
    code = (
        "import torch.optim.optimizer as o, sparsemem\n"
        "hooks = o._global_optimizer_post_hooks\n"
        "assert len(hooks) == 0\n"
        "sparsemem.MemoryBank(4, 2), sparsemem.MemoryBank(4, 2)\n"
        "assert len(hooks) == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repository)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_does_not_tell_of_what_somebody_else_changed(name):
    pytest.importorskip("faiss")
    bank = MemoryBank(500, W, metric="l2", index="IVF16,Flat", background=False, exact_below=1)
    bank.append(torch.randn(500, W))
    bank.index.rebuild()
    far = torch.full((1, W), 50.0)
    bank.keys.grad = sparse([3], torch.randn(1, W), 500)
    with torch.no_grad():
        bank.keys[7] = far  # nobody tells
    OPTIMISERS[name](bank.parameters()).step()
    with pytest.warns(UserWarning, match="keys were changed in place"):
        assert bank.read(far, 1).ids.tolist() == [[7]]
