"""The kernels of temporal links against the torch code; models with them: test_gpu_step.py."""

import pytest
import torch

from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from sparsemem.memory.links import TemporalLinks
from tests.kernels.comparing import F32, F64

CLOSE = {F32: {"rtol": 1e-5, "atol": 1e-7}, F64: {"rtol": 1e-12, "atol": 1e-14}}
TOUCHED = (7, 5)  # of two elements of a batch: few, so that ids repeat and rows overflow


def entries(heads, count, weights_of, dtype):
    """Random sparse vectors [2, heads, count] over what each element has touched."""
    ids = torch.stack([torch.randint(0, touched, (heads, count)) for touched in TOUCHED])
    return Entries(ids, weights_of(ids.shape).to(dtype))


def few_values(shape):
    """Weights that are often equal, zero, or too small for the grid, and add up exactly."""
    values = torch.tensor([0, 0, 2**-32, 0.0625, 0.0625, 0.125, 0.25], dtype=F64)
    return values[torch.randint(0, 7, shape)]


def any_values(shape):
    """Weights as they are in a model."""
    return torch.rand(shape, dtype=F64) / shape[-1]


def moved(parts, device):
    return Entries(*(part.to(device) for part in parts))


def both_ways(links, last, top_k, extent):
    """What precedes and what follows the last reads."""
    found = [links.follow(way, last, top_k, extent) for way in (links.precedes, links.follows)]
    return tuple(torch.stack(parts, 2) for parts in zip(*found, strict=True))


def assert_equal(ours, truth, dtype):
    """Equal ids, and weights up to rounding."""
    assert torch.equal(ours[0].cpu(), truth[0])
    torch.testing.assert_close(ours[1].cpu(), truth[1], **CLOSE[dtype])


CASES = [  # heads, K, L, rows that there is room for, pieces, weights, dtype
    (2, 2, 3, 9, 1, few_values, F64),
    (1, 2, 4, 9, 3, few_values, F64),
    (1, 3, 1, 20, 3, any_values, F32),
    (1, 7, 2, 7, 1, few_values, F64),  # K of as many rows, of which one element has touched fewer
]


@pytest.mark.parametrize("case", CASES)
def test_equal_torch_step_by_step(case, triton_device, monkeypatch):
    """Also where rows are gone through in several pieces."""
    from sparsemem.kernels.gpu import step

    heads, top_k, kept, extent, pieces, weights_of, dtype = case
    if pieces > 1:
        monkeypatch.setattr(step, "TILE", 32)
        monkeypatch.setattr(step, "PAIRS", 64)
        monkeypatch.setattr(step, "parts_of", lambda rows, searches: pieces)
    store = Episode.start(2, 100, 2, device=triton_device, dtype=dtype)._store
    store.touched, store.extent = torch.tensor(TOUCHED, device=triton_device), extent
    ours = TemporalLinks.start(2, heads, kept, torch.empty(0, dtype=dtype, device=triton_device))
    truth = TemporalLinks.start(2, heads, kept, torch.empty(0, dtype=dtype))
    truth.reserve(extent)
    sizes = step.Sizes(dtype, heads, 10, 2, top_k, True)
    assert step.can_link(sizes, ours)
    for t in range(4):
        last = entries(heads, sizes.read if t else 0, weights_of, dtype)
        write = entries(heads, last.ids.shape[2] + 1, weights_of, dtype)
        given = (moved(write, triton_device), moved(last, triton_device))
        found = step.links_step(sizes, store, ours, *given)
        truth.update(write, extent)
        assert_equal(found, both_ways(truth, last, top_k, extent), dtype)
        assert_equal(ours.precedence, truth.precedence, dtype)
        for name in ("follows", "precedes"):
            tables = (getattr(links, name) for links in (ours, truth))
            assert_equal(*([part[:, :, :extent] for part in table] for table in tables), dtype)
    assert found[1].any(), "something was linked"


def test_read_weights_may_add_up_to_more_than_one(triton_device):
    """Row 3 follows row 1, which is read with weight 2.5, row 4 row 2, read with 3."""
    from sparsemem.kernels.gpu import step

    store = Episode.start(1, 100, 2, device=triton_device, dtype=F64)._store
    store.extent, store.touched = 5, torch.tensor([5], device=triton_device)
    links = TemporalLinks.start(1, 1, 1, torch.empty(0, dtype=F64, device=triton_device))
    links.reserve(5)
    links.follows.ids[0, 0, 3:5] = torch.tensor([[1], [2]], device=triton_device)
    links.follows.weights[0, 0, 3:5] = 1
    last = Entries(torch.tensor([[[1, 2, 0]]]), torch.tensor([[[2.5, 3, 0]]], dtype=F64))
    write = Entries(torch.zeros(1, 1, 4, dtype=torch.int64), torch.zeros(1, 1, 4, dtype=F64))
    given = (moved(write, triton_device), moved(last, triton_device))
    ids, weights_of = step.links_step(step.Sizes(F64, 1, 10, 2, 2, True), store, links, *given)
    assert ids[0, 0].tolist() == [[0, 1], [4, 3]]
    assert weights_of[0, 0, 1].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert not weights_of[0, 0, 0].any()


def test_more_links_than_a_program_compares_are_left_to_torch(triton_device, monkeypatch):
    """70 links of a row: two such rows are not joined in a program."""
    from sparsemem.kernels.gpu import step

    monkeypatch.setattr(step, "mix_links", None)
    store = Episode.start(2, 100, 2, device=triton_device, dtype=F64)._store
    store.extent = 9
    ours, truth = (
        TemporalLinks.start(2, 1, 70, torch.empty(0, dtype=F64, device=triton_device))
        for _ in range(2)
    )
    truth.reserve(9)
    last = moved(entries(1, 6, any_values, F64), triton_device)
    write = moved(entries(1, 7, any_values, F64), triton_device)
    for _ in range(2):
        found = step.links_step(step.Sizes(F64, 1, 10, 2, 2, True), store, ours, write, last)
        truth.update(write, 9)
    assert_equal(found, [part.cpu() for part in both_ways(truth, last, 2, 9)], F64)
