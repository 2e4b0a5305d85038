"""Rows far from all lists of an index on a device: kept beside them, or so many that it is left."""

import pytest
import torch

from tests.oracles.device_index import agreement, first, ids_of, make
from tests.oracles.fresh_index import N, W, clustered

pytest.importorskip("faiss")
pytestmark = pytest.mark.usefixtures("told", "device_engine")


def tight(count: int, seed: int) -> torch.Tensor:
    """Rows close to sixteen of the corners of a cube."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).repeat(1, W // 4)
    noise = 0.05 * torch.randn(count, W, generator=generator)
    return corners[torch.randint(16, (count,), generator=generator)] + noise


def test_rows_far_from_all_lists_stay_until_the_lists_are_trained_anew(device):
    index = make(device, "IVF64,Flat", tight(N, 1), buffer_rows=8)
    far = torch.eye(W)[:4] - torch.eye(W)[4:]  # as far from all corners as can be
    index.update(ids_of(0, 4, device), far.to(device))
    index.update(ids_of(4, 24, device), tight(20, 2).to(device))
    stats = index.stats()
    assert stats["strays"] == 4
    assert stats["buffered"] <= 12
    index.current.setting = index.current.setting._replace(effort=1)  # found all the same
    assert first(index, far) == list(range(4))
    index.update(ids_of(0, 2, device), tight(2, 3).to(device))  # come home
    index.update(ids_of(24, 44, device), tight(20, 4).to(device))
    assert index.stats()["strays"] == 2
    index.remove(ids_of(3, 4, device))
    assert first(index, far[3:]) != [3]
    index.rebuild()
    assert index.stats()["buffered"] == 0
    assert first(index, far[2:3]) == [2]


def test_an_index_that_strays_overrun_is_not_searched(device, monkeypatch):
    index = make(device, "IVF64,Flat", tight(N, 1), buffer_rows=8, min_recall=0.9)
    with monkeypatch.context() as patched:
        patched.setattr(type(index.upkeep), "_rebuild_due", lambda upkeep: False)
        for start in range(0, N // 2, 50):  # half of the rows go where no list is
            index.update(ids_of(start, start + 50, device), -2 * clustered(50, start).to(device))
        assert index.current.overrun
        assert index.stats()["exact"]
        assert agreement(index, -2 * clustered(150, seed=9)) == 1  # and the sample is of these
    index.update(ids_of(N - 1, N, device), tight(1, 3).to(device))
    assert index.upkeep.rebuilds == 2, "new lists were due"
    assert not index.current.overrun
    assert not index.stats()["exact"]
    assert agreement(index, -2 * clustered(60, seed=9)) >= 0.9


def test_without_a_floor_lists_that_strays_overrun_are_searched(device, monkeypatch):
    index = make(device, "IVF64,Flat", tight(N, 1), buffer_rows=8)
    monkeypatch.setattr(type(index.upkeep), "_rebuild_due", lambda upkeep: False)
    index.update(ids_of(0, N // 2, device), -2 * clustered(N // 2).to(device))
    index.update(ids_of(0, 9, device), clustered(9).to(device))
    assert index.current.overrun
    assert not index.stats()["exact"]


def test_many_rows_of_which_few_stray_overrun_nothing(device, monkeypatch):
    index = make(device, "IVF64,Flat", tight(N, 1), buffer_rows=8, min_recall=0.9)
    monkeypatch.setattr(type(index.upkeep), "_rebuild_due", lambda upkeep: False)
    rows = tight(N // 2, 5)
    rows[:2] = torch.eye(W)[:2] - torch.eye(W)[4:6]
    index.update(ids_of(0, N // 2, device), rows.to(device))
    index.update(ids_of(10, 19, device), tight(9, 6).to(device))
    assert index.stats()["buffered"] <= 8
    assert 2 <= index.current.lost < 20, "they came when more waited than may stray"
    assert not index.current.overrun
