"""Clipping against torch's of the same gradients made dense."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from sparsemem import MemoryBank
from sparsemem.optim import clip_grad_norm
from tests.oracles.row_optimizers import sparse


def parameters(scale=1.0):
    """A dense one, a sparse one with repeated rows, an empty sparse one, one without gradient."""
    result = [nn.Parameter(torch.zeros(7, 3, dtype=torch.float64)) for _ in range(4)]
    result[0].grad = scale * torch.randn(7, 3, dtype=torch.float64)
    result[1].grad = sparse([5, 1, 5, 5], scale * torch.randn(4, 3, dtype=torch.float64), 7)
    result[2].grad = sparse([], torch.zeros(0, 3, dtype=torch.float64), 7)
    return result


def dense_copies(own):
    copies = [nn.Parameter(parameter.detach().clone()) for parameter in own]
    for copy, parameter in zip(copies, own, strict=True):
        if parameter.grad is not None:
            copy.grad = parameter.grad.to_dense().clone()
    return copies


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.5, math.inf])
@pytest.mark.parametrize("max_norm", [0.7, 100.0, 0.0, math.inf])
def test_equals_torch_on_dense_gradients(norm_type, max_norm):
    own = parameters()
    dense = dense_copies(own)
    total = clip_grad_norm(own, max_norm, norm_type)
    expected = clip_grad_norm_(dense, max_norm, norm_type)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(own[:3], dense[:3], strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), theirs.grad, rtol=1e-12, atol=1e-15)
    assert own[1].grad.is_sparse
    assert own[1].grad._nnz() == 2
    assert own[3].grad is None


def test_repeated_rows_that_cancel_do_not_count():
    parameter = nn.Parameter(torch.zeros(3, 2))
    parameter.grad = sparse([1, 1, 2], torch.tensor([[5.0, 5.0], [-5.0, -5.0], [3.0, 4.0]]), 3)
    assert clip_grad_norm(parameter, 1.0).item() == 5
    torch.testing.assert_close(parameter.grad.to_dense().norm(), torch.tensor(1.0))


def test_no_gradients():
    assert clip_grad_norm([nn.Parameter(torch.zeros(2))], 1.0).item() == 0
    assert clip_grad_norm(iter([]), 1.0).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite(bad):
    own = parameters()
    own[1].grad = sparse([4], torch.tensor([[1.0, bad, 1.0]], dtype=torch.float64), 7)
    before = own[0].grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm(own, 1.0, error_if_nonfinite=True)
    assert torch.equal(own[0].grad, before)
    assert not clip_grad_norm(own, 1.0).isfinite()


def test_a_bank_in_a_model():
    bank, linear = MemoryBank(10, 4, dtype=torch.float64), nn.Linear(4, 4).double()
    bank.append(torch.randn(10, 4, dtype=torch.float64))
    hit = bank.read(linear(torch.randn(5, 4, dtype=torch.float64)), 3)
    (100 * hit.scores.sum() + hit.rows.square().sum()).backward()
    everything = [*bank.parameters(), *linear.parameters()]
    dense = dense_copies(everything)
    assert clip_grad_norm(everything, 1.0) > 1
    clip_grad_norm_(dense, 1.0)
    for mine, theirs in zip(everything, dense, strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), theirs.grad, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(clip_grad_norm(everything, 1.0).item(), 1.0, rtol=1e-5, atol=0)


def test_options(plain_errors):
    with pytest.raises(ValueError, match="max_norm is -1, expected a number of at least 0"):
        clip_grad_norm([], -1)
    with pytest.raises(ValueError, match="max_norm is nan"):
        clip_grad_norm([], math.nan)
    with pytest.raises(ValueError, match="norm_type is 0, expected a number above 0"):
        clip_grad_norm([], 1.0, 0)
