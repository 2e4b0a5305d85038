"""Which slots were accessed least recently, without touching the others."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemem.memory.entries import Entries, totals

ACCESS_THRESHOLD = 0.005  # delta of Rae et al. 2016, section 3.2
NEVER = -1  # as a time; as an id: none


class AccessOrder:
    """Last access times of the first `capacity` slots of B episodes, and their order.

    A *lap* is the list of slots in the order of their last access when the lap began; lap 0
    is the slots in id order and is not stored. Slots not accessed since precede all that
    were, so the least recently accessed slots are the next entries of the lap that are
    still free. A used-up lap is replaced by sorting: amortised over accesses of nearly all
    slots, which have been touched by then.
    """

    def __init__(self, batch_size: int, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.time = 0
        self.last_access = torch.full((batch_size, 0), NEVER, device=device)
        self.lap: Tensor | None = None  # [B, N], once an episode has touched all its slots
        self.lap_start = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        # Entries of the lap before `pointer` are used up, but for those in `kept`: chosen
        # before, and not accessed after all (-1: none).
        self.pointer = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.kept = torch.empty(batch_size, 0, dtype=torch.int64, device=device)

    def grow(self, capacity: int) -> None:
        """Make room for slots 0 .. capacity - 1."""
        batch_size, old = self.last_access.shape
        grown = self.last_access.new_full((batch_size, capacity), NEVER)
        grown[:, :old] = self.last_access
        self.last_access = grown

    def mark(self, accesses: Entries) -> None:
        """Record one step's accesses [B, H, S]: ids whose weights exceed delta for some head."""
        when = torch.where(totals(accesses) > ACCESS_THRESHOLD, self.time, NEVER)
        self.last_access.scatter_reduce_(1, accesses.ids.flatten(1), when.flatten(1), "amax")
        self.time += 1

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """The `count` least recently accessed slots, ties and never-accessed ones by id."""
        wanted = max(count, self.kept.shape[1])
        window = 2 * wanted
        while True:
            window = min(window, self.num_slots)
            position = self.pointer + torch.arange(window, device=self.pointer.device)
            ids = torch.cat([self.kept, self._entries(position)], 1)
            rank = (self._accessed(ids) < self.lap_start).logical_and_(ids >= 0).cumsum(1)
            if bool((rank[:, -1] >= count).all()):
                break
            if window == self.num_slots:
                self._begin_lap(rank[:, -1] < count)
            window *= 2
        numbers = torch.arange(1, wanted + 1, device=rank.device).expand(len(rank), -1)
        first = torch.searchsorted(rank, numbers.contiguous())
        chosen = ids.gather(1, first.clamp(max=ids.shape[1] - 1))
        chosen = chosen.masked_fill(first == ids.shape[1], NEVER)  # fewer are left than are kept
        used = first.masked_fill(first == ids.shape[1], 0).amax(1, keepdim=True) + 1
        self.pointer += (used - self.kept.shape[1]).clamp(min=0)
        self.kept = chosen
        return chosen[:, :count]

    def _entries(self, position: Tensor) -> Tensor:
        inside = position.clamp(max=self.num_slots - 1)
        ids = inside if self.lap is None else self.lap.gather(1, inside)
        return ids.masked_fill(position >= self.num_slots, NEVER)

    def _accessed(self, ids: Tensor) -> Tensor:
        # A slot beyond the capacity has never been touched.
        capacity = self.last_access.shape[1]
        known = self.last_access.gather(1, ids.clamp(0, capacity - 1))
        return torch.where(ids < capacity, known, NEVER)

    def _begin_lap(self, which: Tensor) -> None:
        if self.last_access.shape[1] < self.num_slots:
            self.grow(self.num_slots)
        if self.lap is None:
            everyone = torch.arange(self.num_slots, device=which.device)
            self.lap = everyone.repeat(len(which), 1)
        self.lap[which] = self.last_access[which].argsort(dim=1, stable=True)
        self.lap_start[which] = self.time
        self.pointer[which] = 0
        # Not in place: the last call gave it out.
        self.kept = self.kept.masked_fill(which.unsqueeze(1), NEVER)

    def to(self, device: torch.device) -> AccessOrder:
        """An independent copy on `device`."""
        copy = AccessOrder(len(self.last_access), self.num_slots, device)
        copy.time = self.time
        copy.lap = None if self.lap is None else self.lap.to(device, copy=True)
        for name in ("last_access", "lap_start", "pointer", "kept"):
            setattr(copy, name, getattr(self, name).to(device, copy=True))
        return copy
