"""What all row optimisers have in common: their equations, against loops and torch's; bad input."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD
from tests.oracles.row_optimizers import CASES, CLOSE, N, RowByRow, W, make, sparse, table

# Torch has no row-wise Adagrad: see test_adagrad.py.
IN_TORCH = [kind for kind, (_, dense, _) in CASES.items() if dense is not None]


@pytest.mark.parametrize("kind", IN_TORCH)
def test_all_rows_touched_equals_the_dense_optimiser(kind):
    _, dense, options = CASES[kind]
    ours = table()
    theirs = nn.Parameter(ours.detach().clone())
    mine, torchs = make(kind, [ours]), dense([theirs], **options)
    for _ in range(8):
        values = torch.randn(N, W, dtype=torch.float64)
        order = torch.randperm(N).tolist()
        ours.grad, theirs.grad = sparse(order, values[order], N), values
        mine.step()
        torchs.step()
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("kind", CASES)
@settings(max_examples=40)
@given(
    pattern=st.lists(st.lists(st.integers(0, N - 1), max_size=8), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_skipped_rows_equal_a_loop_over_rows(kind, pattern, seed):
    torch.manual_seed(seed)
    parameter = table()
    optimiser, oracle = make(kind, [parameter]), RowByRow(kind, parameter.detach())
    for ids in pattern:
        values = torch.randn(len(ids), W, dtype=torch.float64)
        parameter.grad = sparse(ids, values, N)
        optimiser.step()
        oracle.step(ids, values)
        torch.testing.assert_close(parameter.detach(), oracle.table, **CLOSE)


@pytest.mark.parametrize("kind", CASES)
def test_rows_that_were_never_touched_do_not_change(kind):
    parameter = table()
    before = parameter.detach().clone()
    optimiser = make(kind, [parameter])
    for _ in range(3):
        parameter.grad = sparse([3, 7], torch.randn(2, W, dtype=torch.float64), N)
        optimiser.step()
    others = [i for i in range(N) if i not in (3, 7)]
    assert torch.equal(parameter[others], before[others])
    assert (parameter[[3, 7]] != before[[3, 7]]).all()


@pytest.mark.parametrize("kind", IN_TORCH)
def test_dense_gradients_of_a_whole_model(kind):
    _, dense, options = CASES[kind]
    torch.manual_seed(1)
    ours = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    theirs = copy.deepcopy(ours)
    mine, torchs = make(kind, ours.parameters()), dense(theirs.parameters(), **options)
    for _ in range(5):
        x = torch.randn(6, 3, dtype=torch.float64)
        for model, optimiser in ((ours, mine), (theirs, torchs)):
            optimiser.zero_grad()
            model(x).square().mean().backward()
            optimiser.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("kind", CASES)
def test_dense_gradients_after_sparse_ones_touch_every_row(kind):
    parameter = table()
    optimiser, oracle = make(kind, [parameter]), RowByRow(kind, parameter.detach())
    for ids in ([1, 2], [2, 5]):
        values = torch.randn(2, W, dtype=torch.float64)
        parameter.grad = sparse(ids, values, N)
        optimiser.step()
        oracle.step(ids, values)
    values = torch.randn(N, W, dtype=torch.float64)
    parameter.grad = values.clone()
    optimiser.step()
    oracle.step(list(range(N)), values)
    torch.testing.assert_close(parameter.detach(), oracle.table, **CLOSE)
    assert torch.equal(parameter.grad, values)  # a gradient is its owner's


@pytest.mark.parametrize("kind", IN_TORCH)
def test_sparse_gradients_after_dense_ones(kind):
    parameter = table()
    optimiser, oracle = make(kind, [parameter]), RowByRow(kind, parameter.detach())
    values = torch.randn(N, W, dtype=torch.float64)
    parameter.grad = values
    optimiser.step()
    oracle.step(list(range(N)), values)
    for ids in ([1, 2], [2, 5]):
        values = torch.randn(2, W, dtype=torch.float64)
        parameter.grad = sparse(ids, values, N)
        optimiser.step()
        oracle.step(ids, values)
    torch.testing.assert_close(parameter.detach(), oracle.table, **CLOSE)


@pytest.mark.parametrize("kind", CASES)
def test_embedding(kind):
    embedding = nn.Embedding(N, W, sparse=True, dtype=torch.float64)
    optimiser, oracle = (
        make(kind, embedding.parameters()),
        RowByRow(kind, embedding.weight.detach()),
    )
    for ids in ([1, 1, 4], [4, 0, 1]):
        optimiser.zero_grad()
        out = embedding(torch.tensor(ids))
        out.square().sum().backward()
        oracle.step(ids, 2 * out.detach())
        optimiser.step()
        torch.testing.assert_close(embedding.weight.detach(), oracle.table, **CLOSE)


@pytest.mark.parametrize("kind", CASES)
def test_rows_of_more_and_of_no_dimensions(kind):
    flat, cubes, single = table(4, 6), table(4, 6), nn.Parameter(torch.randn(4).double())
    cubes = nn.Parameter(flat.detach().clone().view(4, 2, 3))
    line = nn.Parameter(single.detach().clone().view(4, 1))
    optimiser = make(kind, [flat, cubes, single, line])
    for ids in ([0, 2], [2, 2]):
        values = torch.randn(2, 6, dtype=torch.float64)
        flat.grad = sparse(ids, values, 4)
        cubes.grad = sparse(ids, values.view(2, 2, 3), 4)
        single.grad, line.grad = sparse(ids, values[:, 0], 4), sparse(ids, values[:, :1], 4)
        optimiser.step()
    torch.testing.assert_close(cubes.view(4, 6), flat, **CLOSE)
    torch.testing.assert_close(single, line.view(4), **CLOSE)


def test_parameters_without_gradient_are_left_alone():
    parameter = table()
    before = parameter.detach().clone()
    optimiser = RowAdam([parameter])
    optimiser.step()
    parameter.grad = sparse([], torch.zeros(0, W, dtype=torch.float64), N)
    optimiser.step()
    assert torch.equal(parameter, before)
    assert not optimiser.state[parameter]


def test_a_bad_gradient_is_refused_before_anything_changes():
    good, bad, dense = table(), table(), table()
    before = [parameter.detach().clone() for parameter in (good, bad, dense)]
    optimiser = RowAdam([("good", good), ("bad", bad), ("dense", dense)])
    good.grad = sparse([1], torch.ones(1, W, dtype=torch.float64), N)
    values = torch.ones(2, W, dtype=torch.float64)
    values[1, 3] = torch.nan
    bad.grad = sparse([4, 9], values, N)
    dense.grad = torch.ones_like(dense)
    with pytest.raises(ValueError, match=r"gradient of bad at \[9, 3\] is nan, expected finite"):
        optimiser.step()
    for parameter, old in zip((good, bad, dense), before, strict=True):
        assert torch.equal(parameter, old)
        assert not optimiser.state.get(parameter)
    bad.grad, dense.grad[2, 1] = None, torch.inf
    with pytest.raises(ValueError, match=r"gradient of dense at \[2, 1\] is inf"):
        optimiser.step()
    assert torch.equal(good, before[0])


def test_other_layouts_are_refused():
    parameter = table()
    optimiser = RowSGD([parameter])
    parameter.grad = torch.ones(N, W, dtype=torch.float64).to_sparse()
    with pytest.raises(TypeError, match="parameter 0 of group 0 is sparse_coo with 2 sparse dim"):
        optimiser.step()


@pytest.mark.parametrize("optimiser", [RowSGD, RowAdagrad, RowAdam, RowAdamW])
def test_options_common_to_all(optimiser, plain_errors):
    for options, message in (
        ({"lr": -1.0}, "lr is -1.0, expected a number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"rounding_seed": -1}, "rounding_seed is -1, expected at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            optimiser([table()], **options)
    ours = optimiser([table()])
    with pytest.raises(ValueError, match="lr is -2"):
        ours.add_param_group({"params": [table()], "lr": -2.0})
    assert len(ours.param_groups) == 1
