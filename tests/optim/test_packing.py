"""Saving only the rows that have state."""

import pytest
import torch

from sparsemem.optim import packing
from sparsemem.optim.packing import pack, unpack


def state(*touched, num_rows=10):
    wide, narrow = torch.zeros(num_rows, 3), torch.zeros(num_rows)
    wide[list(touched)] = torch.randn(len(touched), 3)
    narrow[list(touched)] = 2.0
    return {"wide": wide, "narrow": narrow}


def empty(num_rows=10):
    return {"wide": torch.zeros(num_rows, 3), "narrow": torch.zeros(num_rows)}


@pytest.mark.parametrize("touched", [(), (3,), (0, 9, 4), (0, 1, 2, 3, 4), tuple(range(10))])
@pytest.mark.parametrize("chunk", [4, 100])
def test_round_trip(touched, chunk, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK", chunk)
    before, after = state(*touched), empty()
    packed = pack(before)
    assert ("rows" in packed) == (len(touched) <= 5)
    if "rows" in packed:
        assert packed["rows"].tolist() == sorted(touched)
        assert packed["wide"].shape == (len(touched), 3)
    assert unpack(packed, after)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_rows_that_only_one_table_has():
    before, after = empty(), empty()
    before["narrow"][7], before["wide"][2, 1] = 1.0, 1.0
    assert pack(before)["rows"].tolist() == [2, 7]
    assert unpack(pack(before), after)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_what_is_not_by_row_stays_as_it_is():
    whole = {"exp_avg": torch.zeros(10, 3), "step": torch.tensor(0.0)}
    assert pack(whole) == whole
    assert pack({}) == {}


def test_what_does_not_fit_changes_nothing():
    packed = pack(state(1, 2))
    for other in (
        {"wide": torch.zeros(10, 3)},
        {**empty(), "more": torch.zeros(10)},
        {"wide": torch.zeros(10, 4), "narrow": torch.zeros(10)},
        {"wide": torch.zeros(10, 3), "narrow": torch.zeros(())},
    ):
        assert not unpack(packed, other)
        assert not any(value.any() for value in other.values())
    assert not unpack(state(1), empty(11))
    assert not unpack(pack(state(9)), empty(9))
