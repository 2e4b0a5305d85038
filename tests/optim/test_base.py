"""What all row optimisers have in common."""

import copy
import gc
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemem import MemoryBank
from sparsemem.optim import RowAdagrad, RowAdam, RowAdamW, RowSGD
from sparsemem.training.checkpoint import optimiser_tensors, restore_optimiser
from tests.oracles.row_optimizers import CASES, RowByRow, sparse

N, W = 12, 5
close = {"rtol": 1e-12, "atol": 1e-12}


def make(kind, parameters, **more):
    optimiser, _, options = CASES[kind]
    return optimiser(parameters, **{**options, **more})


def table(num_rows=N, width=W, dtype=torch.float64):
    return nn.Parameter(torch.randn(num_rows, width, dtype=dtype))


def make_bank(num_rows=N, dtype=torch.float64, **options):
    bank = MemoryBank(num_rows, W, dtype=dtype, **options)
    bank.append(torch.randn(num_rows, W, dtype=dtype))
    return bank


class CountingElements(TorchDispatchMode):
    """The most elements that any operation's result had."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        in_place = isinstance(result, torch.Tensor) and any(result is arg for arg in args)
        if isinstance(result, torch.Tensor) and not in_place and not result.is_sparse:
            self.most = max(self.most, result.numel())
        return result


# Equations


@pytest.mark.parametrize("kind", CASES)
def test_all_rows_touched_equals_the_dense_optimiser(kind):
    _, dense, options = CASES[kind]
    if dense is None:
        pytest.skip("torch has no row-wise Adagrad: see test_adagrad.py")
    ours, theirs = table(), None
    theirs = nn.Parameter(ours.detach().clone())
    mine, torchs = make(kind, [ours]), dense([theirs], **options)
    for _ in range(8):
        values = torch.randn(N, W, dtype=torch.float64)
        order = torch.randperm(N).tolist()
        ours.grad, theirs.grad = sparse(order, values[order], N), values
        mine.step()
        torchs.step()
        torch.testing.assert_close(ours, theirs, **close)


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
        torch.testing.assert_close(parameter.detach(), oracle.table, **close)


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


@pytest.mark.parametrize("kind", ["momentum", "adam", "adamw", "adam-l2", "nesterov", "sgd"])
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
        torch.testing.assert_close(a, b, **close)


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
    torch.testing.assert_close(parameter.detach(), oracle.table, **close)
    assert torch.equal(parameter.grad, values)  # a gradient is its owner's


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "adagrad"])
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
    torch.testing.assert_close(parameter.detach(), oracle.table, **close)


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
        torch.testing.assert_close(embedding.weight.detach(), oracle.table, **close)


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
    torch.testing.assert_close(cubes.view(4, 6), flat, **close)
    torch.testing.assert_close(single, line.view(4), **close)


def test_parameters_without_gradient_are_left_alone():
    parameter = table()
    before = parameter.detach().clone()
    optimiser = RowAdam([parameter])
    optimiser.step()
    parameter.grad = sparse([], torch.zeros(0, W, dtype=torch.float64), N)
    optimiser.step()
    assert torch.equal(parameter, before)
    assert not optimiser.state[parameter]


@pytest.mark.parametrize("kind", CASES)
def test_cost_follows_what_is_touched(kind):
    num_rows = 100_000
    bank = MemoryBank(num_rows, W)
    bank.append(torch.randn(num_rows, W))
    embedding = nn.Parameter(torch.randn(num_rows, W))
    optimiser = make(kind, [bank.keys, embedding])
    for _ in range(2):  # in the first step state is made
        for parameter in (bank.keys, embedding):
            parameter.grad = sparse([5, 99_000, 5], torch.randn(3, W), num_rows)
        with CountingElements() as counted:
            optimiser.step()
    assert 0 < counted.most < 100


def test_state_of_a_huge_table_takes_no_memory():
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    bank = MemoryBank(20_000_000, 32)  # 2.5 GB, twice that for the moments
    ids = bank.append(torch.randn(3, 32))
    bank.keys.grad = sparse(ids.tolist(), torch.randn(3, 32), 20_000_000)
    RowAdam(bank.parameters()).step()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1]) - before
    assert pages * 4096 < 100e6


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CASES)
def test_half_precision_is_float32_rounded_at_the_end(kind, dtype):
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


# What goes around an optimiser


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
    torch.testing.assert_close(a[1], starts[0][1] - 1.5, **close)
    torch.testing.assert_close(b[1], starts[1][1] - 3.0, **close)


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
    torch.testing.assert_close(banks[0].keys, banks[1].keys, **close)
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


# A bank in the loop


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("index", ["exact", "IVF16,Flat"])
def test_the_next_search_finds_a_moved_row(kind, index):
    if index != "exact":
        pytest.importorskip("faiss")
    options = {} if index == "exact" else {"background": False, "exact_below": 1}
    bank = MemoryBank(500, W, metric="l2", index=index, **options)
    rows = torch.randn(500, W)
    bank.append(rows)
    if index != "exact":
        bank.index.rebuild()
        assert bank.stats()["exact"] is False
    optimiser = make(kind, bank.parameters(), lr=100.0)
    found = bank.read(rows[7:8], 1)
    assert found.ids.tolist() == [[7]]
    bank.keys.grad = sparse([7], torch.ones(1, W), 500)
    optimiser.step()
    moved = bank.keys[7:8].detach().clone()
    assert (moved - rows[7]).abs().min() > 10
    hit = bank.read(moved, 1)
    assert hit.ids.tolist() == [[7]]
    assert hit.scores.item() == 0
    assert bank.read(rows[7:8], 1).ids.item() != 7
    bank.close()


def test_only_moved_keys_are_told(monkeypatch):
    bank = make_bank(value_width=3)
    told = []
    monkeypatch.setattr(bank, "changed", lambda ids: told.append(ids.tolist()))
    optimiser = RowSGD(bank.parameters())
    bank.keys.grad = sparse([5, 2, 5], torch.randn(3, W, dtype=torch.float64), N)
    bank.values.grad = sparse([1], torch.randn(1, 3, dtype=torch.float64), N)
    optimiser.step()
    assert told == [[2, 5]]


def test_a_durable_bank_is_told_of_keys_and_values():
    class Journal:
        def __init__(self):
            self.ids = []

        def touched(self, ids):
            self.ids += ids.tolist()

    bank = make_bank(value_width=3)
    bank.journal = Journal()
    bank.keys.grad = sparse([5, 2], torch.randn(2, W, dtype=torch.float64), N)
    bank.values.grad = sparse([1], torch.randn(1, 3, dtype=torch.float64), N)
    RowSGD(bank.parameters()).step()
    assert sorted(bank.journal.ids) == [1, 2, 5]
    bank.journal = None


def test_rows_change_under_the_write_lock(monkeypatch):
    bank, held = make_bank(), []
    real = RowSGD._update

    def update(self, *args):
        held.append(bank.table.lock._writer is not None)
        real(self, *args)

    monkeypatch.setattr(RowSGD, "_update", update)
    dense = table()
    optimiser = RowSGD([bank.keys, dense])
    bank.keys.grad = sparse([5], torch.randn(1, W, dtype=torch.float64), N)
    dense.grad = torch.ones_like(dense)
    optimiser.step()
    assert sorted(held) == [False, True]


def test_rows_removed_or_frozen_after_the_backward_pass_are_left_alone():
    bank = make_bank()
    optimiser = RowAdam(bank.parameters())
    bank.keys.grad = sparse([2, 3, 4], torch.ones(3, W, dtype=torch.float64), N)
    before = bank.keys.detach().clone()
    bank.remove(torch.tensor([3]))
    bank.freeze(torch.tensor([4]))
    optimiser.step()
    assert torch.equal((bank.keys != before).any(1).nonzero().squeeze(1), torch.tensor([2]))
    assert not bank.book.live[3]
    assert optimiser.state[bank.keys]["step"].tolist() == [0, 0, 1] + [0] * (N - 3)
    assert 3 not in bank.read(before[3:4], N - 1).ids


def test_a_gradient_is_not_for_the_row_that_took_the_place():
    bank = make_bank()
    optimiser = RowSGD(bank.parameters(), lr=1.0)
    bank.keys.grad = sparse([2, 3], torch.ones(2, W, dtype=torch.float64), N)
    bank.remove(torch.tensor([3]))
    new = torch.randn(1, W, dtype=torch.float64)
    assert bank.append(new).tolist() == [3]
    before = bank.keys.detach().clone()
    optimiser.step()
    assert torch.equal(bank.keys[3:4], new)
    torch.testing.assert_close(bank.keys[2], before[2] - 1, **close)


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "sgd"])
def test_state_of_removed_rows_goes(kind):
    bank = make_bank(value_width=W)
    optimiser = make(kind, bank.parameters())
    for parameter in bank.tables:
        parameter.grad = sparse([2, 3], torch.ones(2, W, dtype=torch.float64), N)
    optimiser.step()
    bank.remove(torch.tensor([3]))
    for parameter in bank.tables:
        assert len(optimiser.state[parameter]) > 0
        for value in optimiser.state[parameter].values():
            assert value[2].all()
            assert not value[3].any()


def test_eviction_forgets_state():
    bank = make_bank()
    optimiser = RowAdagrad(bank.parameters())
    bank.keys.grad = sparse(list(range(N)), torch.ones(N, W, dtype=torch.float64), N)
    optimiser.step()
    (gone,) = bank.append(torch.randn(1, W, dtype=torch.float64)).tolist()
    assert optimiser.state[bank.keys]["sum"].nonzero().squeeze(1).tolist() == [
        i for i in range(N) if i != gone
    ]


def test_a_bank_does_not_keep_its_optimiser():
    bank = make_bank()
    optimiser = RowAdam(bank.parameters())
    assert len(bank._listeners) == 1
    del optimiser
    gc.collect()
    assert len(bank._listeners) == 0


def test_a_dense_gradient_of_a_bank_moves_trainable_rows_only():
    bank = make_bank()
    bank.remove(torch.tensor([1]))
    bank.freeze(torch.tensor([2]))
    before = bank.keys.detach().clone()
    bank.keys.grad = torch.ones_like(bank.keys)
    RowSGD(bank.parameters(), lr=1.0).step()
    expected = before - 1
    expected[[1, 2]] = before[[1, 2]]
    torch.testing.assert_close(bank.keys.detach(), expected, **close)


# Bad input


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


# Saving


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
    torch.testing.assert_close(ours, parameter, **close)


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
