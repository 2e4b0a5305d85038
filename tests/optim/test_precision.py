"""Rows of half precision, and rounding that keeps small updates."""

import json

import pytest
import torch
from torch import nn

from sparsemem.optim import RowSGD
from tests.oracles.row_optimizers import CASES, N, W, make, sparse


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CASES)
def test_half_precision_is_float32_rounded_at_the_end(kind, dtype, monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")  # which rounds alike, to the last bit
    start = torch.randn(N, W).to(dtype)
    half, full = nn.Parameter(start.clone()), nn.Parameter(start.float())
    mine, reference = make(kind, [half]), make(kind, [full])
    for _ in range(4):
        full.data.copy_(half.data)
        values = torch.randn(3, W).to(dtype)
        half.grad, full.grad = sparse([1, 4, 1], values, N), sparse([1, 4, 1], values.float(), N)
        mine.step()
        reference.step()
        assert torch.equal(half, full.to(dtype))
    for key, value in mine.state[half].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, reference.state[full][key])


def rounded_run(seed, steps, optimiser=None, parameter=None):
    parameter = nn.Parameter(torch.ones(4, 64, dtype=torch.bfloat16))
    optimiser = RowSGD([parameter], lr=1e-4, rounding_seed=seed)
    for _ in range(steps):
        parameter.grad = sparse([0, 2], torch.ones(2, 64, dtype=torch.bfloat16), 4)
        optimiser.step()
    return parameter.detach().float()


def test_stochastic_rounding_keeps_small_updates():
    rows = rounded_run(3, 400)
    # 1 - 400 * 1e-4, where one step is 1/78 of bfloat16's last digit below 1 (2^-8).
    assert abs(rows[[0, 2]].mean().item() - 0.96) < 0.003
    assert (rows[[1, 3]] == 1).all()
    assert (rounded_run(None, 400) == 1).all()


def test_stochastic_rounding_is_a_function_of_the_seed():
    assert torch.equal(rounded_run(3, 50), rounded_run(3, 50))
    assert not torch.equal(rounded_run(3, 50), rounded_run(4, 50))


def test_stochastic_rounding_goes_on_after_a_restart():
    parameter = nn.Parameter(torch.ones(4, 64, dtype=torch.bfloat16))
    saved = None
    optimiser = RowSGD([parameter], lr=1e-4, rounding_seed=3)
    for step in range(50):
        if step == 20:
            saved = optimiser.state_dict()
            optimiser = RowSGD([parameter], lr=1e-4, rounding_seed=3)
            optimiser.load_state_dict(json.loads(json.dumps(saved)))
        parameter.grad = sparse([0, 2], torch.ones(2, 64, dtype=torch.bfloat16), 4)
        optimiser.step()
    assert torch.equal(parameter.detach().float(), rounded_run(3, 50))
