"""Which slots were accessed least recently, without touching the others."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem import devices
from sparsemem.memory.entries import Entries, totals
from sparsemem.memory.slots import NONE, Slots

ACCESS_THRESHOLD = 0.005  # delta of Rae et al. 2016, section 3.2


class AccessOrder:
    """Last access times of `capacity` positions of B episodes, and the order of their slots.

    A *lap* is the list of slots in the order of their last access when the lap began; the
    first is `slots.first_lap` and is not stored. Slots not accessed since precede all that
    were, so the least recently accessed slots are the next entries of the lap that are
    still free. A used-up lap is replaced by sorting: amortised over accesses of nearly all
    slots, which have been touched by then.

    On a device all this would make the host wait at every step: there `scan` looks at all
    positions that have been touched, as the search does, and the laps stay as they began, which
    is right at any time: where no entry of the first lap is left, the next lap is sorted.
    """

    def __init__(self, batch_size: int, slots: Slots, device: torch.device) -> None:
        self.slots = slots
        self.time = 0
        self.last_access = torch.full((batch_size, 0), NONE, device=device)  # of positions
        self.lap: Tensor | None = None  # [B, N], once an episode has touched all its slots
        # When an episode's lap began; 0: the first lap (a later one follows an access).
        self.lap_start = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self._edition = slots.edition
        # Entries of the lap before `pointer` are used up, but for those in `kept`: chosen
        # before, and not accessed after all (-1: none).
        self.pointer = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.kept = torch.empty(batch_size, 0, dtype=torch.int64, device=device)

    def grow(self, capacity: int) -> None:
        """Make room for positions 0 .. capacity - 1."""
        batch_size, old = self.last_access.shape
        grown = self.last_access.new_full((batch_size, capacity), NONE)
        grown[:, :old] = self.last_access
        self.last_access = grown

    def mark(self, accesses: Entries) -> None:
        """Record one step's accesses [B, H, S]: positions of weights over delta for some head."""
        when = torch.where(totals(accesses) > ACCESS_THRESHOLD, self.time, NONE)
        self.last_access.scatter_reduce_(1, accesses.ids.flatten(1), when.flatten(1), "amax")
        self.time += 1

    def scan(self, count: int, visible: int) -> Int[Tensor, "B count"]:
        """What `least_recent` gives, where positions are slots; the host waits for nothing.

        Of the first `visible` positions, which hold all that were touched and `count` more, or
        all that there are: those of the smallest (last access, position).
        """
        positions = torch.arange(visible, device=self.last_access.device)
        key = (self.last_access[:, :visible] - NONE) * visible + positions
        return key.topk(count, largest=False).indices

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """The `count` least recently accessed slots, ties by id; never-accessed ones first.

        Those come in the order of the first lap.
        """
        if self._edition != self.slots.edition:
            self._rewind(self.lap_start == 0)
            self._edition = self.slots.edition
        wanted = max(count, self.kept.shape[1])
        window = 2 * wanted
        while True:
            window = min(window, self.slots.lap_length)
            at = self.pointer + torch.arange(window, device=self.pointer.device)
            ids = torch.cat([self.kept, self._entries(at)], 1)
            rank = (self._accessed(ids) < self.lap_start).logical_and_(ids >= 0).cumsum(1)
            if bool((rank[:, -1] >= count).all()):
                break
            if window == self.slots.lap_length:
                self._begin_lap(rank[:, -1] < count)
            window *= 2
        numbers = torch.arange(1, wanted + 1, device=rank.device).expand(len(rank), -1)
        first = torch.searchsorted(rank, numbers.contiguous())
        chosen = ids.gather(1, first.clamp(max=ids.shape[1] - 1))
        chosen = chosen.masked_fill(first == ids.shape[1], NONE)  # fewer are left than are kept
        used = first.masked_fill(first == ids.shape[1], 0).amax(1, keepdim=True) + 1
        self.pointer += (used - self.kept.shape[1]).clamp(min=0)
        self.kept = chosen
        return chosen[:, :count]

    def _entries(self, at: Tensor) -> Tensor:
        first = self.slots.first_lap(at)
        if self.lap is None:
            return first
        ended = at >= self.slots.num_slots
        later = self.lap.gather(1, at.masked_fill(ended, 0)).masked_fill(ended, NONE)
        return torch.where(self.lap_start == 0, first, later)

    def _accessed(self, ids: Tensor) -> Tensor:
        # A position beyond the capacity has never been touched.
        positions, capacity = self.slots.positions(ids), self.last_access.shape[1]
        known = self.last_access.gather(1, positions.clamp(0, capacity - 1))
        return torch.where(positions < capacity, known, NONE)

    def _begin_lap(self, which: Tensor) -> None:
        if self.lap is None:
            self.lap = self.kept.new_empty(len(which), self.slots.num_slots)
        times = self.slots.by_slot(self.last_access)
        self.lap[which] = times[which].argsort(dim=1, stable=True)
        self.lap_start[which] = self.time
        self._rewind(which.unsqueeze(1))

    def _rewind(self, which: Tensor) -> None:
        # Not in place: the last call gave `kept` out.
        self.pointer = self.pointer.masked_fill(which, 0)
        self.kept = self.kept.masked_fill(which, NONE)

    def to(self, device: torch.device, slots: Slots) -> AccessOrder:
        """An independent copy on `device`, over a copy of the slots."""
        copy = AccessOrder(len(self.last_access), slots, device)
        copy.time, copy._edition = self.time, self._edition
        copy.last_access = self.last_access.to(device, copy=True)
        if slots.is_prefix and devices.is_device(copy.last_access):
            return copy
        copy.lap = None if self.lap is None else self.lap.to(device, copy=True)
        for name in ("lap_start", "pointer", "kept"):
            setattr(copy, name, getattr(self, name).to(device, copy=True))
        return copy
