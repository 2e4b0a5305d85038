import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemem.bank import MemoryBank
from sparsemem.memory import slots as slots_module
from sparsemem.memory.slots import NONE, BankSlots, FreeSlots, PrefixSlots


def bank_with(live):
    bank = MemoryBank(len(live), 2)
    set_live(bank, live)
    return bank


def set_live(bank, live):
    present = bank.table.live.tolist()
    gone = [i for i, (was, now) in enumerate(zip(present, live, strict=True)) if was and not now]
    come = [i for i, (was, now) in enumerate(zip(present, live, strict=True)) if now and not was]
    bank.remove(torch.tensor(gone, dtype=torch.int64))
    bank.write(torch.tensor(come, dtype=torch.int64), torch.ones(len(come), 2))


marks = st.lists(st.booleans(), min_size=1, max_size=40)


@given(marks, st.integers(1, 7))
def test_free_slots_are_found_by_id(live, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots_module, "SCANNED_AT_ONCE", window)
        free = FreeSlots(bank_with(live).table)
        expected = [slot for slot, taken in enumerate(live) if not taken]
        assert free.count == len(expected)
        assert [free[rank] for rank in range(free.count)] == expected
        assert [free[rank] for rank in reversed(range(free.count))] == expected[::-1]


def test_a_full_bank_and_one_without_holes_are_not_scanned():
    table = bank_with([True] * 5 + [False] * 3).table
    table.live = None  # nobody may look
    free = FreeSlots(table)
    assert [free[rank] for rank in range(3)] == [5, 6, 7]


@given(marks)
def test_the_first_lap_lists_free_slots_then_the_others_each_once(live):
    slots = BankSlots(bank_with(live), 2, 4)
    at = torch.arange(slots.lap_length + 3).expand(2, -1)
    entries = slots.first_lap(at)
    listed = [entry for entry in entries[0].tolist() if entry != NONE]
    free = [slot for slot, taken in enumerate(live) if not taken]
    assert listed == free + [slot for slot, taken in enumerate(live) if taken]
    assert torch.equal(entries[0], entries[1])
    assert (entries[:, -3:] == NONE).all()


@given(marks, st.data())
def test_refreshing_sees_rows_come_and_go(live, data):
    bank = bank_with(live)
    slots = BankSlots(bank, 1, 4)
    before = slots.edition
    slots.refresh()
    assert slots.edition == before
    now = data.draw(st.lists(st.booleans(), min_size=len(live), max_size=len(live)))
    set_live(bank, now)
    slots.refresh()
    assert (slots.edition != before) == (now != live)
    assert slots.untouched_free(3).tolist()[0] == [i for i, on in enumerate(now) if not on][:3] + [
        NONE
    ] * max(0, 3 - now.count(False))


def test_a_slot_that_becomes_free_before_those_touched_is_the_first():
    bank = bank_with([True, False, False, False])
    slots = BankSlots(bank, 1, 4)
    slots.enter(torch.tensor([[1]]))
    assert slots.untouched_free(2).tolist() == [[2, 3]]
    bank.remove(torch.tensor([0]))
    slots.refresh()
    assert slots.untouched_free(2).tolist() == [[0, 2]]


def test_each_episode_has_its_own_positions():
    slots = BankSlots(bank_with([False, True, True, False]), 2, 4)
    entered = slots.enter(torch.tensor([[3, 1, 3], [1, 1, 0]]))
    assert [tuple(new) for new in entered] == [(0, 0, 3), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    assert slots.positions(torch.tensor([[1, 2], [1, 3]])).tolist() == [[1, 4], [0, 4]]
    assert slots.enter(torch.tensor([[1], [1]])) == []
    assert slots.untouched(torch.tensor([[1, 2, -1]]), [0]).tolist() == [[-1, 2, -1]]
    assert slots.untouched_free(2).tolist() == [[0, NONE], [3, NONE]]


def test_a_copy_goes_its_own_way():
    slots = BankSlots(bank_with([False] * 4), 1, 4)
    slots.enter(torch.tensor([[0]]))
    copy = slots.copy()
    copy.enter(torch.tensor([[1]]))
    copy.of[0, 1] = 1
    assert slots.untouched_free(1).tolist() == [[1]]
    assert copy.untouched_free(1).tolist() == [[2]]
    assert (slots.of == NONE).all()


def test_times_by_slot():
    slots = BankSlots(bank_with([False, True, True, False]), 1, 3)
    slots.enter(torch.tensor([[2, 0]]))
    slots.of = torch.tensor([[2, 0, NONE]])
    # Slot 2 was accessed at 7, slot 0 never; slots 1 and 3 have no position. 0 and 3 are free.
    assert slots.by_slot(torch.tensor([[7, NONE, NONE]])).tolist() == [[-2, -1, 7, -2]]
    assert PrefixSlots(4).by_slot(torch.tensor([[7, NONE]])).tolist() == [[7, NONE, NONE, NONE]]
