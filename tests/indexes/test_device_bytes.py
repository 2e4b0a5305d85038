"""What an index on a device takes, told from sizes, against what a real one has."""

import pytest
import torch

from sparsemem.indexes import device_buffer, device_derived
from sparsemem.indexes.device_buffer import FIRST_CAPACITY, DeviceBuffer, buffer_bytes
from sparsemem.indexes.device_derived import (
    DeviceDerived,
    derived_bytes,
    entry_bytes,
    label_bytes,
)
from sparsemem.indexes.device_faiss import TEMPORARY_BYTES, Engine, GpuEngine
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable
from tests.oracles.fresh_index import N, W, clustered

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def table_of(dtype, device, count=N) -> RowTable:
    rows = clustered(count).to(device, dtype)
    return RowTable(rows, torch.ones(len(rows), dtype=torch.bool, device=device))


def built(table, name) -> DeviceDerived:
    pytest.importorskip("faiss")
    kind = Engine
    if table.rows.is_cuda:
        if not GpuEngine.there():
            pytest.skip("needs FAISS GPU")
        kind = GpuEngine
    derived = DeviceDerived(table, Metric.l2, name, kind)
    derived.build()
    return derived


def taken(buffer: DeviceBuffer) -> int:
    return buffer.place.nbytes + buffer.ids.nbytes + buffer._rows.nbytes


def check(derived, name, entries, most) -> None:
    """The whole and its parts are as predicted."""
    table = derived.table
    row = table.rows.element_size() * table.width
    known = derived.label_of.nbytes + derived.row_of.nbytes
    assert buffer_bytes(table.num_rows, row, most) == taken(derived.buffer)
    assert label_bytes(table.num_rows, entries) == known
    entry = entry_bytes(name, table.width, derived.metric)
    temporary = TEMPORARY_BYTES if table.rows.is_cuda else 0
    whole = derived_bytes(table.num_rows, row, entry, entries, most) + temporary
    assert whole == derived.num_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, FIRST_CAPACITY // 2, FIRST_CAPACITY + 1])
def test_a_buffer_takes_what_its_sizes_tell(dtype, count, device):
    table = table_of(dtype, device)
    row = W * table.rows.element_size()
    buffer = DeviceBuffer(table)
    assert buffer_bytes(N, row) == taken(buffer) == buffer.num_bytes()
    buffer.mark(torch.arange(count, device=device) % N)
    assert buffer_bytes(N, row, count) == taken(buffer) == buffer.num_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["IVF16,Flat", "IVF16,SQ8", "IVF4,PQ4np", "Flat"])
def test_an_index_takes_what_its_sizes_tell_fresh_and_grown(name, dtype, device, monkeypatch):
    monkeypatch.setattr(device_buffer, "FIRST_CAPACITY", 16)
    table = table_of(dtype, device)
    derived = built(table, name)
    check(derived, name, N, 0)
    derived.mark(torch.arange(100, device=device))
    check(derived, name, N, 100)
    derived.reach = None  # none strays
    derived.absorb(30)
    check(derived, name, N + 30, 100)
    derived.mark(torch.arange(150, 300, device=device))  # beside the 70 that still wait
    check(derived, name, N + 30, 220)


def test_labels_of_rows_that_are_entered_in_parts(device, monkeypatch):
    monkeypatch.setattr(device_derived, "BUILD_CHUNK", 100)
    check(built(table_of(torch.float32, device, 730), "Flat"), "Flat", 730, 0)
