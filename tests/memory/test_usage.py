import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemem.memory.entries import Entries
from sparsemem.memory.slots import PrefixSlots
from sparsemem.memory.usage import ACCESS_THRESHOLD, AccessOrder


def order_of(batch_size, num_slots):
    return AccessOrder(batch_size, PrefixSlots(num_slots), torch.device("cpu"))


class Loops:
    """Last access times in a dictionary; the least recent by sorting all slots."""

    def __init__(self, num_slots):
        self.num_slots, self.last, self.time = num_slots, {}, 0

    def least_recent(self, count):
        order = sorted(range(self.num_slots), key=lambda slot: (self.last.get(slot, -1), slot))
        return order[:count]

    def mark(self, heads):
        for head in heads:
            total = {}
            for slot, weight in head:
                total[slot] = total.get(slot, 0) + weight
            for slot, weight in total.items():
                if weight > ACCESS_THRESHOLD:
                    self.last[slot] = self.time
        self.time += 1


WEIGHTS = st.sampled_from([0.0, 0.003, 0.004, 0.1, 0.9])  # two small ones together are an access


@st.composite
def histories(draw):
    num_slots = draw(st.integers(1, 12))
    heads = draw(st.integers(1, min(3, num_slots)))
    supports = draw(st.integers(1, 4))
    entry = st.tuples(st.integers(0, num_slots - 1), WEIGHTS)
    step = st.lists(
        st.lists(entry, min_size=supports, max_size=supports), min_size=heads, max_size=heads
    )
    batch = st.lists(step, min_size=2, max_size=2)
    return num_slots, heads, draw(st.lists(batch, min_size=1, max_size=25))


@settings(max_examples=150, deadline=None)
@given(histories(), st.booleans())
def test_equals_sorting_all_slots(history, fresh_too):
    num_slots, heads, steps = history
    order = order_of(2, num_slots)
    order.grow(num_slots)
    loops = [Loops(num_slots), Loops(num_slots)]
    for batch in steps:
        expected = [loop.least_recent(heads) for loop in loops]
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


def test_a_huge_memory_starts_with_its_first_slots():
    order = order_of(1, 2**40)
    order.grow(4)
    assert order.least_recent(6).tolist() == [[0, 1, 2, 3, 4, 5]]
    order.mark(Entries(torch.tensor([[[0, 2]]]), torch.tensor([[[1.0, 1.0]]])))
    assert order.least_recent(3).tolist() == [[1, 3, 4]]
    assert order.lap is None


def test_heads_are_not_added_up():
    order = order_of(1, 4)
    order.grow(4)
    order.mark(Entries(torch.tensor([[[0], [0]]]), torch.tensor([[[0.004], [0.004]]])))
    assert order.last_access.tolist() == [[-1, -1, -1, -1]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=12))
def test_asking_for_other_numbers_loses_no_slot(counts):
    order, loop = order_of(1, 5), Loops(5)
    order.grow(5)
    for count in counts:
        chosen = order.least_recent(count).tolist()[0]
        assert chosen == loop.least_recent(count)
        order.mark(Entries(torch.tensor([[[chosen[-1]]]]), torch.ones(1, 1, 1)))
        loop.mark([[(chosen[-1], 1.0)]])


def test_a_slot_that_is_never_accessed_does_not_slow_the_others(monkeypatch):
    """One head's gate stays shut: its slot is offered for ever, and the rest is not rescanned."""
    order = order_of(1, 2**40)
    looked_at = []
    entries = AccessOrder._entries
    monkeypatch.setattr(
        AccessOrder, "_entries", lambda self, p: looked_at.append(p.numel()) or entries(self, p)
    )
    order.grow(2000)
    for step in range(500):
        chosen = order.least_recent(2)
        assert chosen.tolist() == [[0, step + 1]]
        weights = torch.tensor([[[0.0], [1.0]]])
        order.mark(Entries(chosen.unsqueeze(-1), weights))
    assert max(looked_at) <= 8
    assert len(looked_at) == 500


def test_a_copy_made_in_a_later_lap_is_independent():
    order = order_of(1, 3)
    order.grow(3)

    def access(which, *slots):
        for slot in slots:
            which.mark(Entries(torch.tensor([[[slot]]]), torch.ones(1, 1, 1)))

    access(order, 0, 1, 2)
    assert order.least_recent(1).tolist() == [[0]]
    copy = order.to(torch.device("cpu"), order.slots)
    access(copy, 1, 0, 2)
    assert copy.least_recent(3).tolist() == [[1, 0, 2]], "the copy has gone on to another lap"
    access(order, 0)
    assert order.least_recent(3).tolist() == [[1, 2, 0]]


def test_a_copy_is_independent():
    order = order_of(1, 4)
    order.grow(4)
    copy = order.to(torch.device("cpu"), order.slots)
    order.mark(Entries(torch.tensor([[[0]]]), torch.tensor([[[1.0]]])))
    assert order.least_recent(1).tolist() == [[1]]
    assert copy.least_recent(1).tolist() == [[0]]
