"""Banks on a device: as on the CPU, and what makes the host wait. (In the tests of a machine
without a GPU the CPU is taken for one, with Triton's kernels in their interpreter.)"""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from sparsemem import MemoryBank
from sparsemem.bank.book import COLUMNS
from sparsemem.devices import is_device
from sparsemem.indexes.device_faiss import GpuEngine
from sparsemem.indexes.exact import ExactIndex
from sparsemem.layers import MemoryLayer
from sparsemem.optim import RowAdam, clip_grad_norm
from tests.oracles.device_kind import on_device
from tests.oracles.row_optimizers import CASES, make
from tests.oracles.synchronisations import Synchronisations

N, W, V = 24, 6, 3
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def reference(monkeypatch):
    """Runs a function on the CPU, as one."""

    def run(function, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setenv("SPARSEMEM_KERNELS", "reference")
            return function(torch.device("cpu"), *arguments, **options)

    return run


@pytest.fixture(autouse=True)
def _searched_on_the_cpu(monkeypatch):
    """Searches on the CPU are the torch code's, and not looked at here."""
    search = ExactIndex._search

    def searched(index, queries, k):
        if queries.device.type != "cpu":
            return search(index, queries, k)
        with monkeypatch.context() as patch, _disable_current_modes():
            patch.setenv("SPARSEMEM_KERNELS", "reference")
            return search(index, queries, k)

    monkeypatch.setattr(ExactIndex, "_search", searched)


class Waits(Synchronisations):
    """Also for the number of distinct rows; a look at the clock is none, as it is on the host."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0] is self.clock:
            return func(*args)
        if name == "_coalesce":
            self.found.append(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def waits_for(bank):
    """A list of the waits in the block: seen by the driver, or by what torch dispatches."""
    if bank.keys.is_cuda:
        found = []
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found += [one for one in caught if "synchronizing" in str(one.message)]
    else:
        with Waits(bank.book.clock) as waits:
            yield waits.found


def filled(device, num_rows=N, **options):
    torch.manual_seed(1)
    bank = MemoryBank(num_rows, W, V, device=device, **options)
    rows, values = torch.randn(N - 4, W), torch.randn(N - 4, V)
    bank.append(*(part.to(device, bank.keys.dtype) for part in (rows, values)))
    return bank


def trained(device, kind, metric, dtype, steps=3):
    """What a bank is after some of everything."""
    bank = filled(device, metric=metric, dtype=dtype)
    optimiser = make(kind, bank.parameters(), lr=0.05)
    seen = []
    for step in range(steps):
        queries = torch.randn(2, 3, W).to(device).requires_grad_()
        hit = bank.read(queries, 4)
        loss = (hit.values.square().sum(-1) * hit.scores).sum() + hit.rows.sum()
        loss.backward()
        if step == 0:
            bank.freeze(hit.ids[0, 0, :1])
            bank.remove(hit.ids[0, 0, 1:2])
        if step == 1:
            bank.append(torch.randn(2, W).to(device), torch.randn(2, V).to(device))
            clip_grad_norm(bank.parameters(), 0.7)
        optimiser.step()
        optimiser.zero_grad()
        seen += [hit.ids, hit.scores, hit.rows, hit.values, queries.grad]
    state = [value for table in bank.tables for value in optimiser.state[table].values()]
    columns = [getattr(bank.book, name) for name, _ in COLUMNS]
    return [part.detach().cpu() for part in (*seen, bank.keys, bank.values, *columns, *state)]


@pytest.mark.parametrize(("kind", "metric"), [*((kind, "cosine") for kind in CASES), ("sgd", "l2")])
def test_training_is_as_on_the_cpu(triton_device, reference, kind, metric):
    expected = reference(trained, kind, metric, torch.float32)
    found = trained(triton_device, kind, metric, torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_half_precision_is_as_on_the_cpu(triton_device, reference):
    expected = reference(trained, "adagrad", "ip", torch.bfloat16, 1)
    found = trained(triton_device, "adagrad", "ip", torch.bfloat16, 1)
    for one, other in zip(found, expected, strict=True):
        near = {"rtol": 2e-2, "atol": 2e-2} if one.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(one, other, **near)


def waits_of_steps(bank, queries) -> tuple[int, int, int]:
    """Waits of a read, its backward pass, and clipping and stepping: of the second training step.

    Kernels are compiled, and state made, in the first one.
    """
    optimiser = RowAdam(bank.parameters(), lr=0.1)
    for _ in range(2):
        with waits_for(bank) as read:
            hit = bank.read(queries, 4)
            loss = (hit.values.sum(-1) * hit.scores).sum()
        with waits_for(bank) as backward:
            loss.backward()
        with waits_for(bank) as step:
            clip_grad_norm(bank.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return len(read), len(backward), len(step)


@pytest.mark.parametrize(
    ("dtype", "metric"),
    [(torch.float32, "cosine"), (torch.bfloat16, "ip"), (torch.float32, "l2")],
)
def test_a_training_step_waits_for_two_checks(triton_device, dtype, metric):
    bank = filled(triton_device, dtype=dtype, metric=metric)
    queries = torch.randn(5, W).to(triton_device).requires_grad_()
    assert waits_of_steps(bank, queries) == (1, 0, 1)


def test_behind_faiss_a_training_step_waits_once_more(triton_device):
    pytest.importorskip("faiss")
    if triton_device.type == "cuda" and not GpuEngine.there():
        pytest.skip("needs FAISS GPU")
    with on_device():
        options = {"index": "IVF2,Flat", "background": False, "exact_below": 1}
        bank = filled(triton_device, **options)
    assert bank.index.current is not None
    queries = torch.randn(5, W).to(triton_device).requires_grad_()
    assert waits_of_steps(bank, queries) == (2, 0, 1)
    rows = bank.keys.detach()[:3]
    assert bank.read(rows, 1).ids.flatten().tolist() == [0, 1, 2]  # found where they went


@pytest.mark.parametrize("change", ["removed", "written", "few"])
def test_gradients_of_rows_that_are_not_there_cost_a_wait(triton_device, change):
    bank = filled(triton_device)
    hit = bank.read(torch.randn(2, W).to(triton_device), N - 1 if change == "few" else 4)
    row = hit.ids[0, :1]
    if change == "removed":
        bank.remove(row)
    if change == "written":
        bank.write(row, torch.ones(1, W).to(triton_device))
    with waits_for(bank) as waits:
        hit.values.sum().backward()
    ids = hit.ids.flatten()
    kept = ids[ids >= 0] if change == "few" else ids[ids != row]
    assert torch.equal(bank.values.grad._indices()[0], kept)
    assert waits


def kept_still(device, how):
    """What a bank is after steps in which some rows that have momentum are not trainable."""
    bank = filled(device)
    optimiser = RowAdam(bank.parameters(), lr=0.1)
    # Near rows, not rows: the gradient of a row's cosine with itself is rounding alone.
    noise = torch.randn(3, W, generator=torch.Generator().manual_seed(0)).to(device)
    queries = bank.keys[:3].detach() + 0.3 * noise

    def backward():
        hit = bank.read(queries, 2)
        if how == "selected":
            bank.select(top=2)
        with waits_for(bank) as waits:
            (hit.values.sum() + hit.scores.sum()).backward()
        assert not (waits and is_device(bank.keys))

    backward()
    optimiser.step()
    rows = torch.tensor([0, 1], device=device)
    if how != "selected":
        bank.freeze(rows)
    optimiser.zero_grad()
    backward()
    if how == "released":
        bank.unfreeze(rows[:1])
    if how == "lifted":
        bank.unfreeze()
        bank.select(None)
    optimiser.step()
    return [part.detach().cpu() for part in (bank.keys, bank.values)]


@pytest.mark.parametrize("how", ["frozen", "selected", "released", "lifted"])
def test_rows_that_are_kept_still_cost_no_wait(triton_device, reference, how):
    expected = reference(kept_still, how)
    for one, other in zip(kept_still(triton_device, how), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_rows_that_are_missing_are_zeros_and_no_access(triton_device):
    bank = MemoryBank(N, W, V, device=triton_device)
    empty = bank.read(torch.randn(2, W).to(triton_device), 3)
    assert empty.ids.eq(-1).all()
    assert not empty.rows.any()
    bank.append(torch.ones(1, W).to(triton_device))
    hit = bank.read(torch.ones(1, W).to(triton_device), 2)
    (hit.scores[:, 0].sum() + hit.rows.sum()).backward()
    assert bank.keys.grad._indices().tolist() == [[0]]
    assert bank.book.accesses.tolist() == [2] + [0] * (N - 1)
    assert bank.book.last_access.tolist() == [3] + [0] * (N - 1)


def test_selection_counts_what_was_read(triton_device):
    bank = filled(triton_device)
    with bank.background():
        bank.read(bank.keys[:2].detach(), 1)
    bank.read(bank.keys[[1, 1, 1, 3]].detach(), 1)
    bank.read(bank.keys[:1].detach(), N)  # finds fewer
    # Rows 0 and 1 were in the background, row 3 was read twice and the others once.
    assert bank.select(top=2).tolist() == [2, 3]
    assert int(bank.book.batches) == 1


def test_the_clock_stays_on_the_host(device):
    bank = filled("cpu").to(device)
    assert bank.keys.device.type == bank.book.live.device.type == device.type
    assert bank.book.clock.device.type == bank.book.batches.device.type == "cpu"
    assert bank.book.now == 1
    bank.read(torch.randn(1, W, device=bank.keys.device), 1)
    state = bank.state_dict()
    assert state["book.clock"] == 2
    other = MemoryBank(N, W, V)
    other.load_state_dict({name: value.to(device) for name, value in state.items()}, assign=True)
    assert other.book.now == 2
    assert other.book.clock.device.type == "cpu"


def test_moved_there_and_back(device):
    bank = filled("cpu", metric="ip")
    queries = torch.randn(3, W)
    before = bank.read(queries, 4)
    bank.to(device)
    there = bank.read(queries.to(device), 4)
    assert torch.equal(there.ids.cpu(), before.ids)
    torch.testing.assert_close(there.scores.cpu(), before.scores, **CLOSE)
    back = bank.to("cpu").read(queries, 4)
    assert torch.equal(back.ids, before.ids)


@pytest.mark.parametrize("durable", [True, False])
def test_saved_on_one_device_and_loaded_on_another(device, tmp_path, durable):
    bank = filled(device, path=tmp_path / "bank" if durable else None)
    bank.freeze(torch.tensor([3], device=device))
    place = None if durable else tmp_path / "snapshot"
    bank.save(place)
    bank.remove(torch.tensor([5], device=device))
    bank.close()
    gone = 1 if durable else 0  # it is logged
    for where in ("cpu", device):
        loaded = MemoryBank.load(place or tmp_path / "bank", device=where)
        assert loaded.table.num_live == N - 4 - gone
        assert loaded.book.num_frozen == 1
        assert loaded.keys.device.type == torch.device(where).type
        assert torch.equal(loaded.keys[:5].cpu(), bank.keys[:5].cpu())
        loaded.close()


@pytest.mark.parametrize("place", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tables_in_a_file_stay_there(tmp_path, place):
    bank = MemoryBank(N, W, storage=tmp_path / "rows")
    with pytest.raises(ValueError, match=rf"cannot move to {place}.*rows', expected storage='ram'"):
        bank.to(place)
    bank.append(torch.ones(1, W))
    assert bank.read(torch.ones(1, W), 1).ids.tolist() == [[0]]
    bank.double().to("cpu")  # which takes them out of the file


def layered(device, kind):
    """What a layer's output and gradients are, the bank's and all others'."""
    torch.manual_seed(2)
    options = {"index": kind, "metric": "ip", "initial": "normal", "device": device}
    bank = MemoryBank(25, W, V, **options)
    bank.remove(torch.arange(3, device=device))
    layer = MemoryLayer(8, bank, num_heads=2, top_k=4)
    layer.to(device)
    input = torch.randn(2, 3, 8).to(device).requires_grad_()
    output = layer(input)
    output.square().sum().backward()
    gradients = [parameter.grad.to_dense() for parameter in layer.parameters()]
    return [part.detach().cpu() for part in (output, input.grad, bank.book.accesses, *gradients)]


@pytest.mark.parametrize("index", ["exact", "product-key"])
def test_a_layer_is_as_on_the_cpu(triton_device, reference, index, monkeypatch):
    expected = reference(layered, index)

    def refuse(*_):
        raise AssertionError("values are copied")

    monkeypatch.setattr("sparsemem.bank.bank.gather", refuse)
    for one, other in zip(layered(triton_device, index), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_layer_waits_for_one_check(triton_device):
    bank = filled(triton_device, metric="ip")
    layer = MemoryLayer(8, bank, num_heads=2, top_k=4).to(triton_device)
    input, counts = torch.randn(2, 3, 8).to(triton_device), []
    for _ in range(2):
        with waits_for(bank) as forward:
            output = layer(input).sum()
        with waits_for(bank) as backward:
            output.backward()
        counts.append((len(forward), len(backward)))
    assert counts[-1] == (1, 0)


@pytest.mark.parametrize("query_norm", ["layer", "batch"])
def test_a_layer_names_the_input_that_is_not_finite(triton_device, query_norm):
    layer = MemoryLayer(8, filled(triton_device), top_k=2, query_norm=query_norm)
    layer.to(triton_device)
    input = torch.randn(2, 3, 8)
    input[1, 2, 5] = torch.nan
    with pytest.raises(ValueError, match=r"input\[1, 2, 5\] is nan, expected finite values"):
        layer(input.to(triton_device))
    if query_norm == "batch":
        assert layer.query_norm.running_mean.isfinite().all()


def test_a_row_that_a_backward_pass_needs_is_not_to_be_written(triton_device):
    bank = filled(triton_device, metric="ip")
    layer = MemoryLayer(8, bank, top_k=2).to(triton_device)
    output = layer(torch.randn(1, 1, 8).to(triton_device)).sum()
    read = bank.book.last_access.eq(2).nonzero().squeeze(1)
    other = bank.book.last_access.ne(2).nonzero().squeeze(1)[:1]
    bank.write(other, torch.ones(1, W).to(triton_device), torch.ones(1, V).to(triton_device))
    output.backward(retain_graph=True)
    bank.write(read[:1], torch.ones(1, W).to(triton_device), torch.ones(1, V).to(triton_device))
    with pytest.raises(RuntimeError, match=rf"row {int(read[0])} was written between a read and"):
        output.backward()


@pytest.mark.gpu
def test_a_layer_under_autocast():
    bank = filled("cuda", metric="ip")
    layer = MemoryLayer(8, bank, num_heads=2, top_k=4).cuda()
    input = torch.randn(2, 3, 8, device="cuda", requires_grad=True)
    expected = layer(input)
    with torch.autocast("cuda", torch.bfloat16):
        output = layer(input)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    assert bank.values.grad.is_sparse
    assert all(parameter.grad is not None for parameter in layer.parameters())
