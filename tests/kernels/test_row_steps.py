"""Compiled steps of rows and gradients through scores, against the torch code; what falls back."""

import pytest
import torch
from torch import nn

from sparsemem import MemoryBank
from sparsemem.bank.rows import through_scores
from sparsemem.indexes.metrics import Metric
from sparsemem.kernels import row_kernels_for
from sparsemem.optim import RowAdam, RowSGD
from sparsemem.optim.base import RowOptimizer
from tests.kernels.test_loading import run_python
from tests.oracles.row_optimizers import CASES, make

pytest.importorskip("numba")

N = 40
CLOSE = {
    torch.float32: {"rtol": 2e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
PATTERN = ([3, 1, 3, 3], [0, 39], [], [11, 1, 1], list(range(N)), [3])


@pytest.fixture
def by_kernel(monkeypatch):
    """Fails where rows are stepped by the torch code, unless the environment asks for it."""
    real = RowOptimizer._step_rows

    def refuse(*arguments):
        assert row_kernels_for(torch.float32) is None, "stepped by the torch code"
        real(*arguments)

    monkeypatch.setattr(RowOptimizer, "_step_rows", refuse)


def stepped(kind, choice, dtype, shape, monkeypatch):
    """A parameter and its optimiser's state after the same steps, by either code."""
    monkeypatch.setenv("SPARSEMEM_KERNELS", choice)
    torch.manual_seed(3)
    parameter = nn.Parameter(torch.randn(N, *shape, dtype=dtype))
    optimiser = make(kind, [parameter])
    for ids in PATTERN:
        values = torch.randn(len(ids), *shape, dtype=dtype)
        places = torch.tensor([ids], dtype=torch.int64).view(1, -1)
        parameter.grad = torch.sparse_coo_tensor(places, values, parameter.shape)
        version = parameter._version
        optimiser.step()
        assert (parameter._version > version) == bool(ids)
    return parameter.detach(), optimiser.state[parameter]


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (64,), (2, 3)])
@pytest.mark.parametrize("kind", CASES)
def test_steps_are_those_of_the_torch_code(kind, shape, dtype, monkeypatch):
    rows, state = stepped(kind, "auto", dtype, shape, monkeypatch)
    expected_rows, expected_state = stepped(kind, "reference", dtype, shape, monkeypatch)
    torch.testing.assert_close(rows, expected_rows, **CLOSE[dtype])
    assert state.keys() == expected_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], **CLOSE[dtype])


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("beta", [0.0, 0.999999])
def test_betas_at_their_ends(beta, monkeypatch):
    results = []
    for choice in ("auto", "reference"):
        monkeypatch.setenv("SPARSEMEM_KERNELS", choice)
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(N, 4))
        optimiser = RowAdam([parameter], lr=0.1, betas=(beta, beta))
        for _ in range(3):
            values = torch.randn(2, 4)
            parameter.grad = torch.sparse_coo_tensor([[1, 2]], values, (N, 4))
            optimiser.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, **CLOSE[torch.float32])


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("width", [1, 33])
def test_entries_and_their_sums_make_the_same_step_to_the_last_bit(kind, width):
    """On rows of a whole table and of its halves, too: as a bank and its shards step them."""
    whole = nn.Parameter(torch.randn(N, width))
    halves = [nn.Parameter(whole.detach()[part::2].clone()) for part in range(2)]
    of_whole, of_halves = make(kind, [whole]), make(kind, halves)
    for _ in range(5):
        ids = torch.randint(N, (1, 300))
        whole.grad = torch.sparse_coo_tensor(ids, torch.randn(300, width), whole.shape)
        sums = whole.grad.coalesce()
        rows, values = sums.indices()[0], sums.values()
        for part, half in enumerate(halves):
            own = rows % 2 == part
            half.grad = torch.sparse_coo_tensor(rows[own][None] // 2, values[own], half.shape)
        of_whole.step()
        of_halves.step()
        for part, half in enumerate(halves):
            assert torch.equal(whole[part::2], half)


def test_state_with_rows_that_lie_apart_and_state_that_began_dense(monkeypatch):
    results = []
    for choice in ("auto", "reference"):
        monkeypatch.setenv("SPARSEMEM_KERNELS", choice)
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(N, 4))
        optimiser = RowAdam([parameter], lr=0.1)
        parameter.grad = torch.randn(N, 4)
        optimiser.step()
        parameter.grad = torch.sparse_coo_tensor([[1, 2]], torch.randn(2, 4), (N, 4))
        optimiser.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results, **CLOSE[torch.float32])


@pytest.mark.parametrize("row", [-1, N])
def test_rows_that_are_not_there_are_refused(row):
    parameter = nn.Parameter(torch.ones(N, 4))
    ids = torch.tensor([[3, row]])
    parameter.grad = torch.sparse_coo_tensor(
        ids, torch.ones(2, 4), parameter.shape, check_invariants=False
    )
    with pytest.raises(IndexError, match=f"row {row} of {N}"):
        RowSGD([parameter]).step()
    assert (parameter == 1).all()


def test_gradients_that_are_not_finite_are_named():
    parameter = nn.Parameter(torch.ones(N, 2))
    values = torch.tensor([[1.0, 1.0], [1.0, torch.nan]])
    parameter.grad = torch.sparse_coo_tensor([[7, 2]], values, (N, 2))
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 at \[2, 1\] is nan"):
        RowSGD([parameter]).step()
    assert (parameter == 1).all()


@pytest.mark.usefixtures("by_kernel")
def test_a_bank_is_told_of_what_was_stepped_and_no_other_row_moves(monkeypatch):
    bank = MemoryBank(N, 4)
    bank.append(torch.randn(N, 4))
    told = []
    monkeypatch.setattr(bank.index, "changed", lambda ids: told.append(ids.tolist()))
    optimiser = RowAdam(bank.parameters(), lr=0.1)
    ids = torch.tensor([[9, 2, 4, 9, 3, 5]])
    bank.keys.grad = torch.sparse_coo_tensor(ids, torch.ones(6, 4), (N, 4))
    bank.freeze(torch.tensor([4]))
    bank._selection.accessed(torch.tensor([2, 3, 4, 9]))
    bank.select(top=4)
    before = bank.keys.detach().clone()
    optimiser.step()
    moved = (bank.keys != before).any(1).nonzero().squeeze(1).tolist()
    assert moved == told[0] == [2, 3, 9]
    assert len(told) == 1
    assert optimiser.state[bank.keys]["step"].nonzero().squeeze(1).tolist() == [2, 3, 9]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("with_rows", [True, False])
def test_gradients_through_scores_are_those_of_autograd(metric, dtype, with_rows, monkeypatch):
    queries = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    rows = torch.randn(6, 3, 5, dtype=dtype, requires_grad=True)
    ids = torch.randint(0, 9, (6, 3))
    ids[2, 1:] = ids[4] = -1
    by_score = torch.randn(6, 3, dtype=dtype)
    by_row = torch.randn(6, 3, 5, dtype=dtype) if with_rows else None
    scores = metric.scores(queries, rows)
    total = (scores * by_score).masked_fill(ids < 0, 0).sum()
    if by_row is not None:
        total = total + (rows * by_row).sum()
    expected = torch.autograd.grad(total, (queries, rows))
    missing = scores.detach().masked_fill(ids < 0, metric.missing)
    given = (queries.detach(), rows.detach(), missing, ids, by_score, by_row)
    for choice in ("auto", "reference"):
        monkeypatch.setenv("SPARSEMEM_KERNELS", choice)
        found = through_scores(metric, *given)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE[dtype])


STEP = """
import sys, torch
from sparsemem import MemoryBank, RowAdam
bank = MemoryBank(20, 4)
bank.append(torch.arange(80.0).view(20, 4))
optimiser = RowAdam(bank.parameters(), lr=0.1)
def step():
    optimiser.zero_grad()
    bank.read(torch.ones(3, 4), 2).scores.sum().backward()
    optimiser.step()
assert "numba" not in sys.modules
step()
optimiser.load_state_dict(optimiser.state_dict())
assert "torch._dynamo" not in sys.modules, "steps of rows import torch's compiler"
"""


def test_numba_is_imported_when_rows_are_stepped(repository):
    run_python(STEP + "assert 'numba' in sys.modules", repository)
    code = STEP + "assert 'numba' not in sys.modules"
    run_python(code, repository, SPARSEMEM_KERNELS="reference")


def test_without_numba_the_torch_code_runs_with_one_warning(repository):
    code = "import sys; sys.modules['numba'] = None\n" + STEP.replace(
        '"numba" not in sys.modules', "True"
    )
    _, errors = run_python(code + "step()\n", repository)
    assert errors.count("RuntimeWarning") == 1
    assert "steps of banks' rows run in plain torch" in errors
