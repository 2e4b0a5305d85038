"""What is lazy about RowAdam and RowAdamW, and where they differ from SparseAdam."""

import math
import resource
import sys

import pytest
import torch
from torch import nn

from sparsemem.optim import RowAdam, RowAdamW
from sparsemem.optim.adam import _correction
from tests.oracles.row_optimizers import sparse

N, W = 4, 3


def ones(*ids):
    return sparse(list(ids), torch.ones(len(ids), W, dtype=torch.float64), N)


def zero_table():
    return nn.Parameter(torch.zeros(N, W, dtype=torch.float64))


def test_the_first_step_of_a_row_is_lr_long_whenever_it_comes():
    ours, theirs = zero_table(), zero_table()
    mine, torchs = RowAdam([ours], lr=0.1), torch.optim.SparseAdam([theirs], lr=0.1)
    for _ in range(1000):
        ours.grad, theirs.grad = ones(0), ones(0)
        mine.step()
        torchs.step()
    ours.grad, theirs.grad = ones(1), ones(1)
    mine.step()
    torchs.step()
    torch.testing.assert_close(ours[1], torch.full((W,), -0.1).double(), rtol=1e-6, atol=0)
    late = 0.1 / math.sqrt(0.001) * math.sqrt(1 - 0.999**1001)  # as the docstring has it
    torch.testing.assert_close(theirs[1], torch.full((W,), -0.1 * late).double(), rtol=1e-3, atol=0)
    assert mine.state[ours]["step"].tolist() == [1000, 1, 0, 0]


def test_a_pause_does_not_fade_the_moments():
    steady, paused = zero_table(), zero_table()
    for parameter, pause in ((steady, 0), (paused, 50)):
        optimiser = RowAdam([parameter], lr=0.1)
        for ids in ([0], *[[1]] * pause, [0]):
            parameter.grad = ones(*ids)
            optimiser.step()
    assert torch.equal(steady[0], paused[0])


def test_decay_of_touched_rows_only():
    parameter = nn.Parameter(torch.ones(N, W, dtype=torch.float64))
    parameter.grad = ones(2)
    RowAdamW([parameter], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(
        parameter[2], torch.full((W,), 0.95 - 0.1).double(), rtol=1e-7, atol=0
    )
    assert (parameter[[0, 1, 3]] == 1).all()


def test_betas_of_zero_are_sign_descent():
    parameter = zero_table()
    parameter.grad = sparse([1], torch.tensor([[3.0, -0.5, 20.0]]).double(), N)
    RowAdam([parameter], lr=0.1, betas=(0.0, 0.0)).step()
    torch.testing.assert_close(parameter[1], torch.tensor([-0.1, 0.1, -0.1]).double())


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_bias_correction_in_float32_has_no_cancellation(beta):
    count = torch.tensor([1.0, 2.0, 1000.0, 1e6])
    exact = torch.tensor([1 - beta**t for t in count.tolist()], dtype=torch.float64)
    torch.testing.assert_close(_correction(beta, count).double(), exact, rtol=3e-7, atol=0)


def test_options(plain_errors):
    for options, message in (
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0, expected a number of at least 0.0, below 1.0"),
        ({"betas": (-0.1, 0.9)}, r"betas\[0\] is -0.1"),
        ({"betas": 0.9}, "betas is 0.9, expected two numbers"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\)"),
        ({"eps": 0.0}, "eps is 0.0, expected a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RowAdam([zero_table()], **options)


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_the_first_step_of_a_row_takes_one_page_fault():
    count, apart = 400, 128  # rows of 2 x 64 bytes: those stepped together share no page
    parameter = nn.Parameter(torch.ones(count * apart, 16))
    optimiser = RowAdam([parameter])

    def faults(start):
        ids = list(range(start, count * apart, apart))
        parameter.grad = sparse(ids, torch.ones(count, 16), count * apart)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimiser.step()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults(0)  # and those of the process
    usual = faults(0)
    assert faults(apart // 2) - usual < 1.2 * count
