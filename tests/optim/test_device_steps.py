"""The row optimisers' kernels, against a loop over rows in float64; and what they do not touch."""

import pytest
import torch
from torch import nn

from sparsemem import MemoryBank
from sparsemem.optim import RowAdam, RowSGD, clip_grad_norm
from sparsemem.optim.base import RowOptimizer
from tests.oracles.row_optimizers import CASES, N, RowByRow, W, make, sparse, table
from tests.oracles.synchronisations import WAITING, Synchronisations

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
PATTERN = ([3, 1, 3, 3], [0], [], [11, 1, 1], [5, 4, 3, 2, 1, 0], [3])


class Waits(Synchronisations):
    """Also for the number of distinct rows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "_coalesce":
            self.found.append("coalesce")
        return super().__torch_dispatch__(func, types, args, kwargs)


def parameter_on(device, width=W, dtype=torch.float32):
    return nn.Parameter(torch.randn(N, width).to(device, dtype))


def sparse_on(device, ids, width=W, dtype=torch.float32):
    values = torch.randn(len(ids), width).to(dtype)
    return sparse(ids, values, N).to(device), values


@pytest.fixture
def by_kernel(monkeypatch):
    """Fails where rows are stepped by the torch code."""

    def refuse(*_):
        raise AssertionError("stepped by the torch code")

    monkeypatch.setattr(RowOptimizer, "_step_rows", refuse)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("kind", CASES)
def test_rows_are_stepped_as_a_loop_steps_them(triton_device, kind):
    parameter = parameter_on(triton_device)
    optimiser = make(kind, [parameter])
    oracle = RowByRow(kind, parameter.detach().double().cpu())
    for ids in PATTERN:
        parameter.grad, values = sparse_on(triton_device, ids)
        version = parameter._version
        optimiser.step()
        oracle.step(ids, values.double())
        torch.testing.assert_close(parameter.detach().double().cpu(), oracle.table, **CLOSE)
        assert (parameter._version > version) == bool(ids)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("kind", ["nesterov", "adagrad", "adamw"])
@pytest.mark.parametrize("width", [1, 300])
def test_widths(triton_device, kind, width):
    parameter = parameter_on(triton_device, width)
    optimiser = make(kind, [parameter])
    oracle = RowByRow(kind, parameter.detach().double().cpu())
    for ids in ([2, 9, 2], [2]):
        parameter.grad, values = sparse_on(triton_device, ids, width)
        optimiser.step()
        oracle.step(ids, values.double())
    torch.testing.assert_close(parameter.detach().double().cpu(), oracle.table, **CLOSE)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("kind", ["momentum", "adagrad", "adam"])
def test_half_precision_is_rounded_once(triton_device, kind):
    parameter = parameter_on(triton_device, dtype=torch.bfloat16)
    optimiser = make(kind, [parameter])
    oracle = RowByRow(kind, parameter.detach().double().cpu())
    ids = [4, 7, 4]
    parameter.grad, values = sparse_on(triton_device, ids, dtype=torch.bfloat16)
    optimiser.step()
    oracle.step(ids, values.double())
    # At most half the distance of its neighbours; the interpreter rounds towards zero.
    share = 2**-8 if triton_device.type == "cuda" else 2**-7
    error = (parameter.detach().double().cpu() - oracle.table).abs()
    assert (error <= share * 1.001 * oracle.table.abs() + 1e-6).all()
    state = optimiser.state[parameter]
    assert all(value.dtype == torch.float32 for value in state.values())


def test_stochastic_rounding_and_float64_take_the_torch_code(triton_device):
    half = parameter_on(triton_device, dtype=torch.bfloat16)
    double = nn.Parameter(table().detach().to(triton_device))
    oracle = RowByRow("sgd", double.detach().cpu())
    half.grad, _ = sparse_on(triton_device, [1, 1], dtype=torch.bfloat16)
    double.grad, values = sparse_on(triton_device, [2, 2], dtype=torch.float64)
    RowSGD([half], lr=0.1, rounding_seed=3).step()
    RowSGD([double], lr=0.1).step()
    oracle.step([2, 2], values)
    torch.testing.assert_close(double.detach().cpu(), oracle.table, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("by_kernel")
def test_wide_parameters_and_embeddings(triton_device):
    cube = nn.Parameter(torch.randn(N, 2, 3).to(triton_device))
    before, values = cube.detach().clone(), torch.randn(3, 2, 3)
    cube.grad = sparse([1, 8, 1], values, N).to(triton_device)
    embedding = nn.Embedding(N, W, sparse=True).to(triton_device)
    embedding(torch.tensor([[1, 5, 1]], device=triton_device)).sum().backward()
    weight = embedding.weight.detach().clone()
    RowSGD([cube, embedding.weight], lr=1.0).step()
    before[1] -= (values[0] + values[2]).to(triton_device)
    before[8] -= values[1].to(triton_device)
    torch.testing.assert_close(cube.detach(), before, **CLOSE)
    weight[1] -= 2
    weight[5] -= 1
    torch.testing.assert_close(embedding.weight.detach(), weight, **CLOSE)


@pytest.mark.usefixtures("by_kernel")
def test_state_that_began_dense_or_elsewhere(triton_device):
    for kind in ("momentum", "adagrad", "adam"):
        parameter = parameter_on("cpu")
        optimiser = make(kind, [parameter])
        oracle = RowByRow(kind, parameter.detach().double())
        values = torch.randn(N, W)
        parameter.grad = values.clone()
        optimiser.step()
        oracle.step(list(range(N)), values.double())
        if kind == "adagrad":  # its dense form keeps a number an element
            continue
        parameter.data = parameter.data.to(triton_device)
        parameter.grad = None
        parameter.grad, values = sparse_on(triton_device, [3, 3, 1])
        optimiser.step()
        oracle.step([3, 3, 1], values.double())
        torch.testing.assert_close(parameter.detach().double().cpu(), oracle.table, **CLOSE)


def bank_on(device, **options):
    bank = MemoryBank(N, W, **{"device": device, "metric": "ip", **options})
    bank.append(torch.randn(N, W, device=device))
    return bank


@pytest.mark.usefixtures("by_kernel")
def test_rows_that_are_not_trainable_by_now_are_left_alone(triton_device):
    bank = bank_on(triton_device)
    optimiser = RowAdam(bank.parameters(), lr=0.1)
    row = {n: torch.tensor([n], device=triton_device) for n in range(N)}
    for _ in range(2):
        bank.keys.grad, _ = sparse_on(triton_device, [2, 3, 4, 2, 5])
        before = bank.keys.detach().clone()
        optimiser.step()
        bank.freeze(row[4])
    moved = (bank.keys != before).any(1).nonzero().squeeze(1).tolist()
    assert moved == [2, 3, 5]  # though row 4 has momentum
    bank.remove(row[3])
    bank._selection.accessed(row[5])
    bank.select(top=1)
    bank.keys.grad, _ = sparse_on(triton_device, [2, 3, 4, 5])
    before = bank.keys.detach().clone()
    optimiser.step()
    assert (bank.keys != before).any(1).nonzero().squeeze(1).tolist() == [5]
    assert optimiser.state[bank.keys]["step"].tolist() == [0, 0, 2, 0, 1, 3] + [0] * (N - 6)


@pytest.mark.parametrize("kind", CASES)
def test_a_step_waits_once(triton_device, kind):
    bank = bank_on(triton_device, value_width=3)
    dense = parameter_on(triton_device)
    optimiser = make(kind, [*bank.parameters(), dense])
    for _ in range(2):  # in the first one state is made
        bank.keys.grad, _ = sparse_on(triton_device, [2, 3, 2])
        bank.values.grad, _ = sparse_on(triton_device, [1, 1], 3)
        dense.grad = torch.ones_like(dense)
        with Waits() as waits:
            optimiser.step()
    assert waits.found == ["_local_scalar_dense"]
    assert "nonzero" in WAITING


def test_gradients_that_are_not_finite_are_named(triton_device):
    parameter = parameter_on(triton_device)
    before = parameter.detach().clone()
    values = torch.tensor([[1.0] * W, [torch.nan] * W, [0.0] * W])
    parameter.grad = sparse([7, 2, 7], values, N).to(triton_device)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0 at \[2, 0\] is nan"):
        RowSGD([parameter]).step()
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [2.0, float("inf"), 1.0])
def test_clipping_waits_for_nothing(triton_device, dtype, norm_type):
    dense = parameter_on(triton_device)
    table = parameter_on(triton_device, dtype=dtype)
    ids = [5, 1, 5, 0]
    table.grad, values = sparse_on(triton_device, ids, dtype=dtype)
    dense.grad = torch.randn_like(dense)
    summed = torch.zeros(N, W, dtype=torch.float64)
    summed.index_add_(0, torch.tensor(ids), values.double())
    wanted = torch.cat([summed.flatten(), dense.grad.double().cpu().flatten()])
    with Waits() as waits:
        total = clip_grad_norm([table, dense], 0.5, norm_type)
    assert not waits.found
    near = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    norm = torch.linalg.vector_norm(wanted, norm_type)
    torch.testing.assert_close(total.double().cpu(), norm, **near)
    scaled = table.grad.to_dense().double().cpu()
    torch.testing.assert_close(scaled, summed * (0.5 / norm), **near)
