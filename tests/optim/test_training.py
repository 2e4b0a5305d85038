"""What goes around an optimiser: schedules, accumulation, autocast, checkpoints."""

import json

import pytest
import torch
from torch import nn

from sparsemem import MemoryBank
from sparsemem.optim import RowAdagrad, RowAdam, RowSGD
from sparsemem.training.checkpoint import optimiser_tensors, restore_optimiser
from tests.oracles.row_optimizers import CASES, CLOSE, N, W, make, make_bank, sparse, table


def test_closure_with_gradients():
    parameter = table()
    optimiser = RowSGD([parameter], lr=0.5)

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.embedding(torch.tensor([2, 4]), parameter, sparse=True).square().sum()
        loss.backward()
        return loss

    before = parameter.detach().clone()
    loss = optimiser.step(closure)
    assert loss.item() == before[[2, 4]].square().sum().item()
    assert not parameter[[2, 4]].any()  # x - 0.5 * 2x
    assert optimiser.step() is None


def test_learning_rate_schedule_and_groups():
    a, b = table(), table()
    starts = a.detach().clone(), b.detach().clone()
    optimiser = RowSGD([{"params": [a]}, {"params": [b], "lr": 2.0}], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 1, 0.5)
    for _ in range(2):
        for parameter in (a, b):
            parameter.grad = sparse([1], torch.ones(1, W, dtype=torch.float64), N)
        optimiser.step()
        schedule.step()
    torch.testing.assert_close(a[1], starts[0][1] - 1.5, **CLOSE)
    torch.testing.assert_close(b[1], starts[1][1] - 3.0, **CLOSE)


def test_learning_rate_as_a_tensor():
    a, b = table(), None
    b = nn.Parameter(a.detach().clone())
    for parameter, lr in ((a, 0.1), (b, torch.tensor(0.1, dtype=torch.float64))):
        parameter.grad = sparse([1], torch.ones(1, W, dtype=torch.float64), N)
        RowAdam([parameter], lr=lr).step()
    assert torch.equal(a, b)


def test_gradients_accumulate():
    start = torch.randn(N, W, dtype=torch.float64)
    banks = []
    for split in (True, False):
        bank = MemoryBank(N, W, dtype=torch.float64)
        bank.append(start)
        banks.append(bank)
        optimiser = RowAdam(bank.parameters())
        queries = start[:6] + 0.1
        for part in queries.split(3) if split else [queries]:
            bank.read(part, 2).scores.sum().backward()
        assert bank.keys.grad.is_sparse
        optimiser.step()
    torch.testing.assert_close(banks[0].keys, banks[1].keys, **CLOSE)
    assert (banks[0].keys != start).any()


def test_autocast():
    bank = make_bank(dtype=torch.float32)
    project = nn.Linear(4, W)
    optimiser = RowAdam([*project.parameters(), *bank.parameters()], lr=0.1)
    x = torch.randn(7, 4)
    before, weight = bank.keys.detach().clone(), project.weight.detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        hit = bank.read(project(x), 2)
        loss = (hit.scores.softmax(-1).unsqueeze(-1) * hit.rows).square().sum()
    loss.backward()
    optimiser.step()
    changed = (bank.keys != before).any(1).nonzero().squeeze(1)
    assert torch.equal(changed, hit.ids.unique())
    assert (project.weight != weight).all()
    assert bank.keys.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*GradScaler")
def test_gradient_scaler_skips_steps_and_scales_back():
    parameter, reference = table(dtype=torch.float32), None
    reference = nn.Parameter(parameter.detach().clone())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimiser = RowAdam([parameter], lr=0.1)
    ids, values = [2, 2, 3], torch.randn(3, W)
    lookup = nn.functional.embedding(torch.tensor(ids), parameter, sparse=True)
    scaler.scale((lookup * values).sum()).backward()
    scaler.step(optimiser)
    scaler.update()
    reference.grad = sparse(ids, values, N)
    RowAdam([reference], lr=0.1).step()
    torch.testing.assert_close(parameter, reference)
    parameter.grad = sparse([1], torch.full((1, W), torch.inf), N)
    before = parameter.detach().clone()
    scaler.step(optimiser)
    scaler.update()
    assert torch.equal(parameter, before)
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("num_touched", [2, N])
def test_state_goes_on_after_a_checkpoint(kind, num_touched):
    def run(restart):
        torch.manual_seed(5)
        bank, linear = make_bank(dtype=torch.float32), nn.Linear(W, 2)
        parameters = [*bank.parameters(), *linear.parameters()]
        optimiser = make(kind, parameters)
        for step in range(6):
            if restart and step == 3:
                tensors, values = optimiser_tensors(optimiser)
                assert all(type(value) is torch.Tensor for value in tensors.values())
                tensors = {name: value.clone() for name, value in tensors.items()}
                optimiser = make(kind, parameters, lr=0.77)
                restore_optimiser(optimiser, tensors, json.loads(json.dumps(values)))
            bank.keys.grad = sparse(list(range(num_touched)), torch.randn(num_touched, W), N)
            for parameter in linear.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimiser.step()
        return parameters

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_loaded_state_is_a_copy_and_keeps_its_precision():
    parameter = table(dtype=torch.bfloat16)
    optimiser = RowAdam([parameter])
    parameter.grad = sparse([1], torch.randn(1, W).bfloat16(), N)
    optimiser.step()
    other = RowAdam([parameter])
    other.load_state_dict(optimiser.state_dict())
    for key, value in optimiser.state[parameter].items():
        loaded = other.state[parameter][key]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, value)
    other.step()
    assert optimiser.state[parameter]["step"][1] == 1


def test_saved_state_has_touched_rows_only():
    parameter = table()
    optimiser = RowAdam([parameter])
    parameter.grad = sparse([8, 1], torch.randn(2, W, dtype=torch.float64), N)
    optimiser.step()
    saved = optimiser.state_dict()["state"][0]
    assert saved["rows"].tolist() == [1, 8]
    assert saved["exp_avg"].shape == (2, W)
    assert torch.equal(saved["exp_avg"], optimiser.state[parameter]["exp_avg"][[1, 8]])


def test_state_of_a_torch_optimiser_is_taken_over():
    parameter = table()
    torchs = torch.optim.Adam([parameter], lr=0.1, betas=(0.7, 0.8))
    ours = nn.Parameter(parameter.detach().clone())
    for _ in range(2):
        parameter.grad = torch.randn(N, W, dtype=torch.float64)
        torchs.step()
    ours.data.copy_(parameter.data)
    mine = RowAdam([ours])
    mine.load_state_dict(torchs.state_dict())
    values = torch.randn(N, W, dtype=torch.float64)
    parameter.grad, ours.grad = values, sparse(list(range(N)), values, N)
    torchs.step()
    mine.step()
    torch.testing.assert_close(ours, parameter, **CLOSE)


def test_state_of_other_parameters_is_refused():
    small, large = table(3, 4), table(5, 4)
    optimiser = RowAdam([small])
    small.grad = sparse([0, 1, 2], torch.randn(3, 4, dtype=torch.float64), 3)
    optimiser.step()
    other = RowAdam([large], lr=0.5)
    with pytest.raises(ValueError, match=r"state of parameter 0 of group 0 is .* for \[5, 4\]"):
        other.load_state_dict(optimiser.state_dict())
    with pytest.raises(ValueError, match="expected that of a RowAdagrad"):
        RowAdagrad([small], lr=0.5).load_state_dict(
            {**optimiser.state_dict(), "param_groups": [{"params": [0]}]}
        )
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state.get(large)
