"""RowAdagrad against torch's Adagrad, where they agree, and what its state is."""

import pytest
import torch
from torch import nn

from sparsemem.optim import RowAdagrad
from tests.oracles.row_optimizers import sparse

N, W = 6, 4


def test_dense_gradients_are_stepped_by_ordinary_adagrad():
    ours = nn.Parameter(torch.randn(N, W, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    mine = RowAdagrad([ours], lr=0.3, weight_decay=0.1)
    torchs = torch.optim.Adagrad([theirs], lr=0.3, weight_decay=0.1)
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(N, W, dtype=torch.float64)
        mine.step()
        torchs.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_rows_of_one_element_are_stepped_as_torchs_sparse_adagrad_does():
    ours = nn.Parameter(torch.randn(N, 1, dtype=torch.float64))
    theirs = nn.Parameter(ours.detach().clone())
    mine, torchs = RowAdagrad([ours], lr=0.3), torch.optim.Adagrad([theirs], lr=0.3)
    for ids in ([0, 3], [3, 3, 5], [0]):
        ours.grad = theirs.grad = sparse(ids, torch.randn(len(ids), 1, dtype=torch.float64), N)
        mine.step()
        torchs.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_step_by_hand():
    parameter = nn.Parameter(torch.zeros(N, 2, dtype=torch.float64))
    optimiser = RowAdagrad([parameter], lr=1.0)
    parameter.grad = sparse([1], torch.tensor([[1.0, 7.0]]).double(), N)
    optimiser.step()  # mean of squares 25
    torch.testing.assert_close(parameter[1], torch.tensor([-0.2, -1.4]).double())
    assert optimiser.state[parameter]["sum"].tolist() == [0, 25, 0, 0, 0, 0]


def test_state_from_dense_steps_becomes_state_by_row():
    torch.manual_seed(2)
    dense, rows = torch.randn(2, N, W, dtype=torch.float64)
    first = nn.Parameter(torch.zeros(N, W, dtype=torch.float64))
    optimiser = RowAdagrad([first])
    first.grad = dense
    optimiser.step()
    first.grad = sparse(list(range(N)), rows, N)
    optimiser.step()
    expected = dense.square().mean(1) + rows.square().mean(1)
    torch.testing.assert_close(optimiser.state[first]["sum"], expected, rtol=1e-12, atol=0)


def test_eps_is_checked(plain_errors):
    with pytest.raises(ValueError, match="eps is -1, expected a number of at least 0"):
        RowAdagrad([nn.Parameter(torch.zeros(2, 2))], eps=-1)
