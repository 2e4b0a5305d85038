"""What a device's memory does without the host's help, on CPU tensors, against what the CPU does.

`forced()` has CPU tensors taken for a device's.
"""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem import devices
from sparsemem.memory.entries import Entries
from sparsemem.memory.episode import Episode
from sparsemem.memory.slots import PrefixSlots
from sparsemem.memory.usage import AccessOrder
from tests.memory.test_usage import Loops, histories

F64 = torch.float64
CPU = torch.device("cpu")


@contextmanager
def forced(on=True):
    """CPU tensors are a device's, unless `on` is False."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "is_device", lambda tensor: on)
        yield


@pytest.fixture
def device_form():
    with forced():
        yield


@settings(max_examples=150, deadline=None)
@given(histories(), st.booleans(), st.lists(st.booleans(), min_size=25, max_size=25))
def test_the_scan_equals_the_laps_and_may_take_turns_with_them(history, fresh_too, moves):
    """Small memories, all of whose slots are used many times over; the order goes to a device
    and comes back between steps.
    """
    num_slots, heads, steps = history
    order, at_device = AccessOrder(2, PrefixSlots(num_slots), CPU), False
    order.grow(num_slots)
    loops = [Loops(num_slots), Loops(num_slots)]
    for batch, move in zip(steps, moves, strict=False):
        if move:
            at_device = not at_device
            with forced(at_device):
                order = order.to(CPU, order.slots)
        expected = [loop.least_recent(heads) for loop in loops]
        touched = max((slot + 1 for loop in loops for slot in loop.last), default=0)
        visible = min(touched + heads, num_slots)
        if at_device:
            assert order.kept.shape == (2, 0)
            chosen = order.scan(heads, visible)
        else:
            chosen = order.least_recent(heads)
        assert chosen.tolist() == expected
        if fresh_too:  # as a cell does: what is least recent is then written
            batch = [
                [[*head, (slot, 0.5)] for head, slot in zip(element, slots, strict=True)]
                for element, slots in zip(batch, expected, strict=True)
            ]
        pairs = torch.tensor(batch)  # [B, H, S, 2]
        order.mark(Entries(pairs[..., 0].long(), pairs[..., 1].double()))
        for loop, element in zip(loops, batch, strict=True):
            loop.mark(element)


def step_of(episode, heads, k, read, generator):
    """One step of a memory: what was chosen, and the episode and its reads afterwards."""
    shape = (episode.batch_size, heads, 3)
    fresh = episode.least_recent(heads)
    ids = torch.cat([read, fresh.unsqueeze(-1)], -1)
    weights = torch.rand(ids.shape, generator=generator, dtype=F64).round(decimals=1).to(ids.device)
    words, query = torch.randn(2, *shape, generator=generator, dtype=F64).to(ids.device)
    episode = episode.write(ids, weights, words, fresh, new=heads)
    read = episode.search(query, k)
    rows, episode = episode.read(read, new=k)
    shares = torch.full(read.shape, 1 / k, dtype=F64, device=ids.device)
    episode.mark_accessed(Entries(torch.cat([ids, read], -1), torch.cat([weights, shares], -1)))
    return episode, read, (fresh, read, rows)


def history_of(num_slots, heads, k, steps, device="cpu"):
    """Everything that the steps choose and read, and the episode at their end."""
    generator = torch.Generator().manual_seed(0)
    episode = Episode.start(2, num_slots, 3, dtype=F64, index_after=100, device=device)
    read, seen = torch.empty(2, heads, 0, dtype=torch.int64, device=device), []
    for _ in range(steps):
        episode, read, step = step_of(episode, heads, k, read, generator)
        seen.append(step)
    return seen, episode


@pytest.mark.parametrize(("num_slots", "steps"), [(2**40, 150), (5, 60), (40, 90), (100, 150)])
@pytest.mark.parametrize(("heads", "k"), [(1, 1), (2, 3), (4, 2)])
def test_an_episode_in_the_device_form_is_the_same(num_slots, steps, heads, k):
    seen, episode = history_of(num_slots, heads, k, steps)
    with forced():
        ours, other = history_of(num_slots, heads, k, steps)
        assert other._store.is_bounded
        assert other._store.trees is None, "a search is a scan at any length"
        assert other.bound >= other.extent == episode.extent
        assert torch.equal(other.touched, episode.touched)
        torch.testing.assert_close(other.rows(), episode.rows(), rtol=0, atol=1e-14)
        assert other.slots.tolist() == episode.slots.tolist()
        assert other.capacity <= min(max(64, 3 * (episode.extent + heads + k)), num_slots)
    for step, truth in zip(ours, seen, strict=True):
        assert torch.equal(step[0], truth[0])
        assert torch.equal(step[1], truth[1])
        torch.testing.assert_close(step[2], truth[2], rtol=0, atol=1e-14)


@pytest.mark.usefixtures("device_form")
def test_the_extent_is_read_back_where_the_table_would_have_to_grow(monkeypatch):
    """Twice a doubling, or so: what is waited for grows with the logarithm of the steps."""
    extents = []
    exact = type(start()._store).exact_extent
    monkeypatch.setattr(
        "sparsemem.memory.store.EpisodeStore.exact_extent",
        lambda self: extents.append((self.extent, exact(self))) or self.extent,
    )
    history_of(2**40, 2, 2, 1000)
    assert 5 <= len(extents) <= 20, "2,000 slots in a table that begins with 64"
    assert all(bound >= extent for bound, extent in extents)
    assert all(later >= 1.1 * earlier for (_, earlier), (_, later) in pairwise(extents))


@pytest.mark.usefixtures("device_form")
def test_while_a_graph_is_captured_the_extent_is_not_read_back(monkeypatch):
    monkeypatch.setattr(devices, "is_capturing", lambda tensor: True)
    monkeypatch.setattr("sparsemem.memory.store.EpisodeStore.exact_extent", None)
    _, episode = history_of(2**40, 2, 2, 100)
    assert episode.bound == 100 * (2 + 2)


def start():
    return Episode.start(1, 8, 3, dtype=F64)


@pytest.mark.usefixtures("device_form")
def test_ids_of_a_caller_are_checked_and_counted_on_a_device_too():
    episode = start()
    with pytest.raises(ValueError, match=r"ids holds slot 8, expected 0 \.\. 7"):
        episode.read(torch.tensor([[[8]]]))
    _, episode = episode.read(torch.tensor([[[5]]]))
    assert episode.bound == episode.extent == 6


@pytest.mark.parametrize("at_first", [False, True])
def test_a_memory_moves_to_a_device_and_back(at_first):
    """In the midst of its laps: 40 slots, 60 steps of two heads before it moves."""
    seen, _ = history_of(40, 2, 2, 90)
    generator = torch.Generator().manual_seed(0)
    with forced(at_first):
        episode = Episode.start(2, 40, 3, dtype=F64)
    read, ours = torch.empty(2, 2, 0, dtype=torch.int64), []
    for step in range(90):
        with forced(at_first ^ (60 <= step < 75)):
            if step in (60, 75):
                episode = episode.to("cpu")
                assert episode.bound == episode.extent
            episode, read, made = step_of(episode, 2, 2, read, generator)
            ours.append(made)
    for step, truth in zip(ours, seen, strict=True):
        assert torch.equal(step[0], truth[0])
        assert torch.equal(step[1], truth[1])


def test_a_bound_is_exact_where_the_host_can_see():
    with forced():
        _, episode = history_of(2**40, 1, 3, 20)
        assert episode.bound > 20 + 3
    moved = episode.to("cpu")
    assert moved.bound == int(episode.touched.max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_slots", [2**40, 40])
def test_an_episode_on_a_gpu_is_the_same(num_slots):
    seen, episode = history_of(num_slots, 2, 3, 90)
    ours, other = history_of(num_slots, 2, 3, 90, "cuda")
    assert other.extent == episode.extent
    torch.testing.assert_close(other.rows().cpu(), episode.rows(), rtol=0, atol=1e-12)
    for step, truth in zip(ours, seen, strict=True):
        assert torch.equal(step[0].cpu(), truth[0])
        assert torch.equal(step[1].cpu(), truth[1])
    back, moved = other.to("cpu"), episode.to("cuda").to("cpu")
    assert back.least_recent(5).tolist() == moved.least_recent(5).tolist()
    assert back.least_recent(5).tolist() == episode.least_recent(5).tolist()
