import pytest
import torch

from sparsemem.bench.points import (
    BankPoint,
    BankSettings,
    ModelPoint,
    ModelSettings,
    benched_model,
    clustered,
    index_name,
)

SMALL = ModelSettings(batch=2, steps=4, heads=2, top_k=2, width=6, hidden=10)


@pytest.mark.parametrize("name", ["lstm", "ntm", "dnc", "sam", "sdnc"])
def test_a_model_has_the_sizes_asked_for(name):
    cell = benched_model(name, 64, SMALL).cell
    assert cell.hidden_size == 10
    if name != "lstm":
        assert (cell.num_slots, cell.slot_dim, cell.num_heads) == (64, 6, 2)


def test_a_point_measures_a_pass_of_its_steps():
    made = ModelPoint("ntm", 256, 4, SMALL).make()
    table = 4 * 2 * 256 * 6  # float32, batch, slots, width: a new table each step
    assert made.figures["peak_tensor_bytes"] > 4 * table
    longer = ModelPoint("ntm", 256, 8, SMALL).make()
    ratio = longer.figures["peak_tensor_bytes"] / made.figures["peak_tensor_bytes"]
    assert 1.6 < ratio < 2.1
    made.work["pass"]()


def test_a_sparse_point_takes_the_same_memory_whatever_its_slots():
    few, many = (
        ModelPoint("sam", slots, 4, SMALL).make().figures["peak_tensor_bytes"]
        for slots in (2**12, 2**30)
    )
    assert few == many


@pytest.mark.parametrize("kind", ["exact", "ivf", "product-key"])
def test_a_bank_is_filled_read_and_updated(kind):
    made = BankPoint(kind, 2_500, BankSettings(width=8, queries=4)).make()
    assert made.figures["recall"] > 0.9
    assert set(made.work) == {"read", "update"}
    for work in made.work.values():
        work()


def test_indexes_are_named_by_their_rows():
    assert index_name("ivf", 1_000_000) == "IVF4000,Flat"
    assert index_name("hnsw", 10) == "HNSW32"
    assert index_name("exact", 10) == "exact"


def test_clustered_rows_lie_around_centres():
    rows = clustered(4_000, 16)
    assert torch.equal(rows, clustered(4_000, 16))
    near = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(1).mean()
    apart = torch.cdist(rows[:100], rows[2_000:]).mean()
    assert near < 0.7 * apart
