"""Which slots the positions of an episode's table stand for.

Over a constant base a position is a slot. Over a bank positions are handed out in the order in
which slots are touched, so that the table stays as small as what is touched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from sparsemem.bank import MemoryBank
from sparsemem.indexes.table import RowTable

NONE = -1  # as a slot; as a time: never
SCANNED_AT_ONCE = 65_536  # marks of rows


class Slots(ABC):
    """What an `AccessOrder` needs to know of slots. The *first lap* lists them all, each once.

    Slots that were never accessed are used in its order. Entries may be NONE.
    """

    edition = 0  # the first lap is another one when this is
    is_prefix = False  # position = slot, and the touched ones are the first

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots

    @property
    @abstractmethod
    def lap_length(self) -> int:
        """Entries of the first lap."""

    @abstractmethod
    def first_lap(self, at: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Entries `at` of the first lap; NONE beyond its end."""

    @abstractmethod
    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Positions of slots; `num_slots` where a slot has none yet."""

    @abstractmethod
    def by_slot(self, times: Int[Tensor, "B M"]) -> Int[Tensor, "B N"]:
        """Times of positions as times of slots; those that have no position come before all."""


class PrefixSlots(Slots):
    """Position = slot; slots are first used in the order of their ids."""

    is_prefix = True

    @property
    def lap_length(self) -> int:
        """Every slot."""
        return self.num_slots

    def first_lap(self, at: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Entry i is slot i."""
        return at.clamp(max=self.num_slots - 1).masked_fill(at >= self.num_slots, NONE)

    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """The slots themselves."""
        return slots

    def by_slot(self, times: Int[Tensor, "B M"]) -> Int[Tensor, "B N"]:
        """The times themselves."""
        return pad(times, (0, self.num_slots - times.shape[1]), value=NONE)


class Entered(NamedTuple):
    """A position that was handed out."""

    element: int
    position: int
    slot: int


class BankSlots(Slots):
    """Slots of a bank that B episodes have touched: each has a map of its own to positions.

    *Free* slots, which hold no live row, are first used before those of live rows.
    """

    def __init__(self, bank: MemoryBank, batch_size: int, capacity: int) -> None:
        super().__init__(bank.num_rows)
        self.bank = bank
        self.places: list[dict[int, int]] = [{} for _ in range(batch_size)]  # slot: position
        shape = (batch_size, capacity)
        self.of = torch.full(shape, NONE, device=bank.keys.device)  # slot of each position
        self.free = FreeSlots(bank.table)
        self._ranks = [0] * batch_size  # free slots of lower rank are touched

    def refresh(self) -> None:
        """See which rows are live now. To be called, as what follows it, under the bank's lock."""
        if not self.free.is_current(self.bank.table):
            self.free = FreeSlots(self.bank.table)
            self._ranks = [0] * len(self.places)
            self.edition += 1

    @property
    def lap_length(self) -> int:
        """The free slots, then all of them (where the free ones are NONE)."""
        return self.free.count + self.num_slots

    def first_lap(self, at: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Free slots by id, then those of live rows by id."""
        free, count = self.free, self.free.count
        slots = [free[rank] if rank < count else rank - count for rank in at.flatten().tolist()]
        entries = torch.tensor(slots, dtype=at.dtype, device=at.device).view_as(at)
        ended = entries >= self.num_slots
        live = self.bank.table.live[entries.masked_fill(ended, 0)]
        return entries.masked_fill((at >= count) & ~live | ended, NONE)

    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Positions of slots; `num_slots` where a slot has none yet."""
        rows = [
            [places.get(slot, self.num_slots) for slot in row]
            for places, row in zip(self.places, slots.tolist(), strict=True)
        ]
        return torch.tensor(rows, dtype=slots.dtype, device=slots.device).view_as(slots)

    def by_slot(self, times: Int[Tensor, "B M"]) -> Int[Tensor, "B N"]:
        """Times of positions as times of slots; of those never accessed, free ones come first."""
        never = torch.where(self.bank.table.live, NONE, NONE - 1)
        never = pad(never, (0, 1))  # the last one takes the positions that are not handed out
        slots = self.of.masked_fill(self.of == NONE, self.num_slots)
        times = torch.where(times == NONE, never[slots], times)
        return never.repeat(len(times), 1).scatter_(1, slots, times)[:, :-1]

    def enter(self, slots: Int[Tensor, "B n"]) -> list[Entered]:
        """Hand out a position to each slot that has none."""
        entered = []
        for element, (places, row) in enumerate(zip(self.places, slots.tolist(), strict=True)):
            for slot in row:
                if slot not in places:
                    entered.append(Entered(element, len(places), slot))
                    places[slot] = len(places)
        return entered

    def untouched(self, slots: Int[Tensor, "Q n"], element: list[int]) -> Int[Tensor, "Q n"]:
        """Slots, but NONE where they are touched by the episode of their row."""
        rows = [
            [NONE if slot in self.places[place] else slot for slot in row]
            for place, row in zip(element, slots.tolist(), strict=True)
        ]
        return torch.tensor(rows, dtype=slots.dtype, device=slots.device).view_as(slots)

    def untouched_free(self, count: int) -> Int[Tensor, "B count"]:
        """The first untouched free slots of each episode; NONE where there are no more."""
        chosen = [self._untouched_free(element, count) for element in range(len(self.places))]
        return torch.tensor(chosen, dtype=self.of.dtype, device=self.of.device)

    def _untouched_free(self, element: int, count: int) -> list[int]:
        places, rank = self.places[element], self._ranks[element]
        chosen: list[int] = []
        while len(chosen) < count and rank < self.free.count:
            slot = self.free[rank]
            rank += 1
            if slot not in places:
                chosen.append(slot)
            elif not chosen:
                self._ranks[element] = rank
        return chosen + [NONE] * (count - len(chosen))

    def copy(self) -> BankSlots:
        """An independent copy."""
        copy = BankSlots(self.bank, 0, 0)
        copy.places = [dict(places) for places in self.places]
        copy.of = self.of.to(self.bank.keys.device, copy=True)
        copy.edition, copy.free, copy._ranks = self.edition, self.free, list(self._ranks)
        return copy


class FreeSlots:
    """Slots of a table without a live row, by id: a sequence that is found as it is asked for."""

    def __init__(self, table: RowTable) -> None:
        self._table, self._changes = table, table.changes
        self.count = table.num_rows - table.num_live
        self._extent = table.extent
        self._holes = table.extent - table.num_live  # behind the extent all are free
        self._found: list[int] = []
        self._scanned = 0

    def is_current(self, table: RowTable) -> bool:
        """Whether no row has come or gone since."""
        return table is self._table and table.changes == self._changes

    def __getitem__(self, rank: int) -> int:
        if rank >= self._holes:
            return self._extent + rank - self._holes
        while rank >= len(self._found):
            stop = self._scanned + SCANNED_AT_ONCE
            free = ~self._table.live[self._scanned : min(stop, self._extent)]
            self._found += (free.nonzero().flatten() + self._scanned).tolist()
            self._scanned = stop
        return self._found[rank]
