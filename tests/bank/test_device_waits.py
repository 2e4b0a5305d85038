"""How often the host waits for a device in what docs/gpu.md has a table of, beyond plain training.

test_device.py counts a read and a training step. Seen from what torch dispatches, with Triton's
kernels in their interpreter where there is no GPU: the host's own clock is not among it.
"""

import pytest
import torch

from sparsemem import SAM, SDNC, MemoryBank
from sparsemem.optim import RowAdam
from tests.oracles.synchronisations import Synchronisations

N, W, V = 64, 8, 4


class Waits(Synchronisations):
    """Also for the number of distinct rows; a look at what a bank keeps on the host is none."""

    def __init__(self, bank):
        super().__init__()
        self.on_host = (bank.book.clock, bank.book.batches)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and any(args[0] is one for one in self.on_host):
            return func(*args)
        if name == "_coalesce":
            self.found.append(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


def waits_of(bank, function) -> int:
    """At the second time."""
    function()
    with Waits(bank) as waits:
        function()
    return len(waits.found)


def filled(device, **options):
    torch.manual_seed(0)
    bank = MemoryBank(N, W, V, device=device, **options)
    rows, values = torch.randn(N - 8, W), torch.randn(N - 8, V)
    bank.append(*(part.to(device, bank.keys.dtype) for part in (rows, values)))
    return bank


def test_changes(triton_device):
    bank = filled(triton_device)
    ids = torch.arange(3, device=triton_device)
    rows, values = torch.randn(3, W, device=triton_device), torch.randn(3, V, device=triton_device)
    assert waits_of(bank, lambda: bank.write(ids, rows, values)) == 7
    many = (rows.repeat(4, 1), values.repeat(4, 1))  # more than are free: others give way
    assert waits_of(bank, lambda: bank.append(*many)) == 17
    with Waits(bank) as waits:
        assert torch.equal(bank.remove(ids), ids)
    assert len(waits.found) == 5


@pytest.mark.parametrize(
    ("options", "top_k"),
    [
        ({"width": W, "index": "product-key", "metric": "ip"}, 4),
        ({"width": W, "num_rows": 200}, 129),
        ({"width": 513}, 4),
    ],
    ids=["product keys", "k", "width"],
)
def test_reads_that_kernels_do_not_serve(options, top_k, triton_device):
    initial = {} if "index" in options else {"initial": "normal"}
    bank = MemoryBank(**{"num_rows": N, **options, **initial}, value_width=V, device=triton_device)
    queries = torch.randn(5, bank.width, device=triton_device)
    assert waits_of(bank, lambda: bank.read(queries, top_k)) == 4


def training_waits(bank, optimiser) -> int:
    queries = torch.randn(5, W, device=bank.keys.device)

    def step():
        hit = bank.read(queries, 4)
        (hit.values.sum(-1) * hit.scores).sum().backward()
        optimiser.step()
        optimiser.zero_grad()

    return waits_of(bank, step)


def test_rounding_by_chance(triton_device):
    bank = filled(triton_device, dtype=torch.bfloat16)
    assert training_waits(bank, RowAdam(bank.parameters(), lr=0.1)) == 2
    optimiser = RowAdam(bank.parameters(), lr=0.1, rounding_seed=1)
    assert training_waits(bank, optimiser) == 8


@pytest.mark.parametrize(("kind", "waits"), [("SparseAdam", 9), ("SGD", 7)])
def test_optimisers_of_torch(kind, waits, triton_device):
    bank = filled(triton_device)
    optimiser = getattr(torch.optim, kind)(list(bank.parameters()), lr=0.1)
    assert training_waits(bank, optimiser) == waits


@pytest.mark.parametrize("model_class", [SAM, SDNC])
def test_models_over_a_bank(model_class, triton_device):
    bank = MemoryBank(N, W, initial="normal", device=triton_device)
    model = model_class(3, 6, 2, num_heads=2, memory=bank).to(triton_device)

    def waits(steps):
        input = torch.randn(2, steps, 3, device=triton_device)
        return waits_of(bank, lambda: model(input)[0].sum().backward())

    assert (waits(10) - waits(5)) / 5 <= 21
