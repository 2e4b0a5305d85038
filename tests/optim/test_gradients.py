"""Gradients made ready: rows added up, bad ones found."""

import pytest
import torch
from torch import nn

from sparsemem.bank.gradients import without_rows
from sparsemem.optim.gradients import check_gradients, make_change
from tests.oracles.row_optimizers import sparse


def change(gradient, dtype=torch.float32):
    parameter = nn.Parameter(torch.zeros(gradient.shape, dtype=dtype))
    parameter.grad = gradient
    return make_change("table", parameter, {})


def test_repeated_rows_add_up(monkeypatch):
    monkeypatch.setenv("SPARSEMEM_KERNELS", "reference")  # a kernel does it itself
    made = change(sparse([4, 0, 4], torch.tensor([[1.0, 2], [5, 5], [10, 20]]), 6))
    assert made.ids.tolist() == [0, 4]
    assert made.gradient.tolist() == [[5, 5], [11, 22]]


def test_bfloat16_entries_add_up_in_float32():
    values = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()  # 256 + 1 is 256 in bfloat16
    made = change(sparse([2, 2, 2], values, 6), torch.bfloat16)
    assert made.gradient.dtype == torch.float32
    assert made.gradient.tolist() == [[258.0]]


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match=r"table is torch\.complex64, expected a real dtype"):
        change(torch.ones(2, dtype=torch.complex64), torch.complex64)


def test_a_finite_gradient_whose_sum_overflows_is_fine():
    huge = torch.full((2, 2), 3e38)
    check_gradients([change(huge), change(sparse([1, 2], huge, 4))])
    check_gradients([])


def test_the_bad_element_is_named():
    values = torch.ones(2, 3)
    values[1, 2] = -torch.inf
    with pytest.raises(ValueError, match=r"gradient of table at \[8, 2\] is -inf, expected finite"):
        check_gradients([change(torch.ones(3)), change(sparse([3, 8], values, 9))])
    with pytest.raises(ValueError, match=r"gradient of table at \[\] is nan"):
        check_gradients([change(torch.tensor(torch.nan))])


def test_without_rows():
    gradient = sparse([4, 0, 4, 2], torch.arange(8.0).view(4, 2), 6)
    rest = without_rows(gradient, torch.tensor([4, 5]))
    assert rest.to_dense().tolist() == [[2, 3], [0, 0], [6, 7], [0, 0], [0, 0], [0, 0]]
    assert not rest.is_coalesced()
    assert without_rows(gradient.coalesce(), torch.tensor([0])).is_coalesced()
    assert without_rows(gradient, torch.tensor([1, 3])) is gradient
