"""RowSGD's own: what it keeps, and its options."""

import pytest
import torch
from torch import nn

from sparsemem.optim import RowSGD
from tests.oracles.row_optimizers import sparse


def step(optimiser, parameter, ids, value=1.0):
    parameter.grad = sparse(ids, torch.full((len(ids), 2), value), 4)
    optimiser.step()


def test_a_skipped_row_neither_coasts_nor_loses_its_momentum():
    parameter = nn.Parameter(torch.zeros(4, 2))
    optimiser = RowSGD([parameter], lr=1.0, momentum=0.5)
    step(optimiser, parameter, [1])
    step(optimiser, parameter, [2])
    assert parameter[1].tolist() == [-1, -1]
    step(optimiser, parameter, [1])
    assert parameter[1].tolist() == [-2.5, -2.5]


def test_no_state_without_momentum():
    parameter = nn.Parameter(torch.zeros(4, 2))
    optimiser = RowSGD([parameter], lr=1.0)
    step(optimiser, parameter, [1])
    assert optimiser.state[parameter] == {}


def test_momentum_may_begin_later():
    parameter = nn.Parameter(torch.zeros(4, 2))
    optimiser = RowSGD([parameter], lr=1.0)
    step(optimiser, parameter, [1])
    optimiser.param_groups[0]["momentum"] = 0.5
    step(optimiser, parameter, [1])
    step(optimiser, parameter, [1])
    assert parameter[1].tolist() == [-3.5, -3.5]


def test_options(plain_errors):
    for options, message in (
        ({"momentum": 1.0}, "momentum is 1.0, expected a number of at least 0.0, below 1.0"),
        ({"nesterov": True}, "nesterov is True, expected False where momentum is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RowSGD([nn.Parameter(torch.zeros(2, 2))], **options)
