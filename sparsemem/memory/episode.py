"""Episode: the rows that one sequence has touched, over a constant base."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.checks import check_at_most, check_size
from sparsemem.indexes.metrics import inverse_norm
from sparsemem.indexes.ranking import top_k
from sparsemem.indexes.sealed import SealedRows
from sparsemem.memory.entries import Entries
from sparsemem.memory.tape import Fork, ReadRows, Tape, WriteRows, flatten_ids
from sparsemem.memory.usage import AccessOrder

FIRST_CAPACITY = 64


class EpisodeStore:
    """What B episodes have touched of N slots of width W; advanced in place.

    Row i of the growing table is slot i: with a constant base the touched slots are always a
    prefix (docs/architecture.md). Rows behind the touched ones hold the base.
    """

    def __init__(self, rows: Tensor, num_slots: int, base: float, index_after: int | None) -> None:
        batch_size, _, width = rows.shape
        self.num_slots = num_slots
        self.base = base
        self.rows = rows  # [B, capacity, W]
        self.norms = inverse_norm(rows)  # of each row
        self.touched = torch.zeros(batch_size, dtype=torch.int64, device=rows.device)
        self.extent = 0  # touched slots of the element that has most
        self.order = AccessOrder(batch_size, num_slots, rows.device)
        self.order.grow(rows.shape[1])
        self.version = 0
        self.index_after = index_after
        self.sealed = None if index_after is None else SealedRows(batch_size, width, index_after)
        self._spare: list[Tensor] = []  # gradient buffers, all zero

    def reserve(self, slots: int) -> None:
        """Make room for the first `slots` slots (twice as many as before, at least)."""
        slots = min(slots, self.num_slots)
        batch_size, old, width = self.rows.shape
        if slots <= old:
            return
        capacity = min(max(slots, 2 * old), self.num_slots)
        rows = self.rows.new_full((batch_size, capacity, width), self.base)
        norms = inverse_norm(rows[:1, -1:]).repeat(batch_size, capacity)
        rows[:, :old], norms[:, :old] = self.rows, self.norms
        self.rows, self.norms = rows, norms
        self.order.grow(capacity)

    def touch(self, ids: Int[Tensor, "B H S"]) -> None:
        """Count slots as touched."""
        if ids.shape[2]:
            self.touched = torch.maximum(self.touched, ids.amax((1, 2)) + 1)
            self.extent = int(self.touched.max())

    def write(self, ids: Tensor, weights: Tensor, words: Tensor, erase: Tensor) -> None:
        """Erase rows `erase` [B, E], then add weights [B, H, S] times words [B, H, W] at ids."""
        self.touch(torch.cat([ids.flatten(1), erase], 1).unsqueeze(1))
        self.reserve(self.extent)
        table, capacity = self.rows.view(-1, self.rows.shape[-1]), self.rows.shape[1]
        flat = flatten_ids(ids, capacity)
        erased = flatten_ids(erase, capacity)
        table.index_fill_(0, erased, 0)
        added = weights.unsqueeze(-1) * words.unsqueeze(2)
        table.index_add_(0, flat, added.flatten(0, 2))
        changed = torch.cat([flat, erased])
        self.norms.view(-1).index_copy_(0, changed, inverse_norm(table.index_select(0, changed)))
        if self.sealed is not None:
            self.sealed.update(torch.cat([ids.flatten(1), erase], 1), self.rows, self.norms)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """The k rows of largest cosine to queries [B, H, W], best first, ties by slot: [B, H, k].

        The first k untouched slots stand for the whole untouched base: they are equal, and
        have the lowest ids of all that are.
        """
        visible = min(self.extent + k, self.num_slots)
        self.reserve(visible)
        scaled = queries * inverse_norm(queries).unsqueeze(-1)
        if self.sealed is not None and self.sealed.absorb(self.touched, self.rows, self.norms):
            rows, norms = self.rows[:, :visible], self.norms[:, :visible]
            candidates, scores = self.sealed.candidates(scaled, k, rows, norms)
            return candidates.gather(2, top_k(scores, k))
        scores = torch.bmm(scaled, self.rows[:, :visible].mT)
        return top_k(scores * self.norms[:, :visible].unsqueeze(1), k)

    def take_buffer(self) -> Tensor:
        """A zero gradient buffer for all rows, for one tape's backward pass."""
        while self._spare:
            buffer = self._spare.pop()
            if buffer.shape == self.rows.shape:
                return buffer
        return torch.zeros_like(self.rows)

    def give_buffer(self, buffer: Tensor) -> None:
        """Take back a buffer that is all zero again."""
        self._spare.append(buffer)

    def to(self, device: torch.device, dtype: torch.dtype) -> EpisodeStore:
        """An independent copy."""
        rows = self.rows.to(device, dtype, copy=True)
        copy = EpisodeStore(rows, self.num_slots, self.base, self.index_after)
        copy.touched = self.touched.to(device, copy=True)
        copy.extent, copy.order = self.extent, self.order.to(device)
        return copy


class Episode:
    """A handle on an `EpisodeStore` at one version of it. Immutable; `write` returns the next.

    The rows are changed in place, so a handle serves for one write only: using it again is
    refused. `clone()` forks the memory (gradients flow back from both), `detach()` cuts the
    gradient.

    Slots are to come from `least_recent` and `search`, which hand them out in the order of their
    ids: memory is held for all slots up to the highest one used.
    """

    __slots__ = ("_operation", "_store", "_tape", "_token", "_version")

    def __init__(self, store: EpisodeStore, tape: Tape, token: Tensor, operation: int) -> None:
        self._store, self._tape, self._token = store, tape, token
        self._operation, self._version = operation, store.version

    @staticmethod
    def start(
        batch_size: int,
        num_slots: int,
        slot_dim: int,
        *,
        base: float = 0.0,
        index_after: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Episode:
        """B episodes whose N slots all hold `base`; nothing of size N is allocated.

        Beyond `index_after` touched slots a search goes through a FAISS index over the older
        rows (None: always exact).
        """
        check_size("batch_size", batch_size)
        check_size("num_slots", num_slots)
        check_size("slot_dim", slot_dim)
        shape = (batch_size, min(FIRST_CAPACITY, num_slots), slot_dim)
        rows = torch.full(shape, base, device=device, dtype=dtype)
        store = EpisodeStore(rows, num_slots, base, index_after)
        return Episode(store, Tape(store), rows.new_zeros(()), -1)

    @property
    def batch_size(self) -> int:
        """Number of episodes."""
        return len(self._store.rows)

    @property
    def num_slots(self) -> int:
        """Number of slots, touched or not."""
        return self._store.num_slots

    @property
    def touched(self) -> Int[Tensor, " B"]:
        """Slots that have been read or written so far, of each episode."""
        return self._store.touched.clone()

    @property
    def capacity(self) -> int:
        """Slots that there is memory for at the moment."""
        return self._store.rows.shape[1]

    @property
    def extent(self) -> int:
        """Slots touched by the episode that has touched most; all others hold the base."""
        return self._store.extent

    def rows(self) -> Float[Tensor, "B M W"]:
        """A copy of slots 0 .. M-1, where M is the largest number of touched slots."""
        self._check_current()
        return self._store.rows[:, : self._store.extent].clone()

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """The `count` least recently accessed slots; never-accessed ones first, ties by id."""
        self._check_current()
        check_at_most("count", check_size("count", count), "num_slots", self.num_slots)
        return self._store.order.least_recent(count)

    def write(
        self,
        ids: Int[Tensor, "B H S"],
        weights: Float[Tensor, "B H S"],
        words: Float[Tensor, "B H W"],
        erase: Int[Tensor, "B E"],
    ) -> Episode:
        """Set rows `erase` to zero, then add weights_h words_h^T at ids_h, for every head h."""
        self._check_current()
        self._check_ids("ids", ids)
        self._check_ids("erase", erase)
        self._check_like("weights", weights, tuple(ids.shape))
        self._check_like("words", words, (*ids.shape[:2], self._store.rows.shape[2]))
        store = self._store
        store.version += 1
        arguments = (self._token, weights, words, ids, erase, self._tape)
        return self._next(WriteRows.apply(*arguments))  # type: ignore[no-untyped-call]

    def search(self, queries: Float[Tensor, "B H W"], k: int) -> Int[Tensor, "B H K"]:
        """Slots of the k rows of largest cosine similarity, best first, ties by slot."""
        self._check_current()
        check_at_most("k", check_size("k", k), "num_slots", self.num_slots)
        with torch.no_grad():
            return self._store.search(queries.detach(), k)

    def read(self, ids: Int[Tensor, "B H S"]) -> tuple[Float[Tensor, "B H S W"], Episode]:
        """Rows at ids, differentiable, and the handle to go on with."""
        self._check_current()
        self._check_ids("ids", ids)
        self._store.touch(ids)
        self._store.reserve(self._store.extent)
        rows, token = ReadRows.apply(self._token, ids, self._tape)  # type: ignore[no-untyped-call]
        return rows, self._next(token)

    def mark_accessed(self, accesses: Entries) -> None:
        """End a step: slots whose weights [B, H, S] exceed delta for a head are accessed now."""
        self._check_current()
        self._store.order.mark(accesses.detach())

    def _next(self, token: Tensor) -> Episode:
        if token.requires_grad:
            return Episode(self._store, self._tape, token, self._tape.length - 1)
        return Episode(self._store, Tape(self._store), token, -1)  # no gradient gets past here

    def detach(self) -> Episode:
        """The same memory, from which no gradient flows back.

        Both handles can be read; the first write through one of them uses up the other.
        """
        self._check_current()
        return Episode(self._store, Tape(self._store), self._token.detach(), -1)

    def clone(self) -> Episode:
        """An independent copy; the gradients of both flow back into what came before.

        Takes time and space of all touched rows; an index is built anew when it is next needed.
        """
        self._check_current()
        store = self._store.to(self._store.rows.device, self._store.rows.dtype)
        tape = Tape(store)
        if not self._token.requires_grad:
            return Episode(store, tape, self._token, -1)
        arguments = (self._token, tape, self._tape, self._operation)
        token = Fork.apply(*arguments)  # type: ignore[no-untyped-call]
        return Episode(store, tape, token, 0)

    def to(self, *args: Any, **kwargs: Any) -> Episode:
        """A detached copy on another device or of another dtype (as in `Tensor.to`)."""
        self._check_current()
        token = self._token.detach().to(*args, **kwargs)
        store = self._store.to(token.device, token.dtype)
        return Episode(store, Tape(store), token, -1)

    def _check_current(self) -> None:
        if (self._version, self._operation) != (self._store.version, self._tape.length - 1):
            raise RuntimeError(
                f"this state was already advanced (it is at write {self._version}, operation"
                f" {self._operation + 1}; its memory at {self._store.version} and"
                f" {self._tape.length}): the memory is changed in place, so a state serves once;"
                " state.clone() forks it"
            )

    def _check_like(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        rows = self._store.rows
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype != rows.dtype or tensor.device != rows.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, the rows are {rows.dtype} on"
                f" {rows.device}"
            )

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if ids.shape[0] != self.batch_size:
            raise ValueError(
                f"{name} has batch size {ids.shape[0]}, the memory has {self.batch_size} episodes"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_slots:
            wrong = ids[(ids < 0) | (ids >= self.num_slots)][0]
            raise ValueError(f"{name} holds slot {int(wrong)}, expected 0 .. {self.num_slots - 1}")
