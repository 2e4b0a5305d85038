"""BankStore: the rows that a batch of episodes has touched, copied from a bank when touched.

Shape letters: B batch, H heads, Q = B H queries, C candidates, W slot width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from sparsemem.bank import MemoryBank
from sparsemem.indexes.base import Found
from sparsemem.indexes.metrics import inverse_norm
from sparsemem.indexes.ranking import on_grid
from sparsemem.memory.candidates import Candidates, joined_candidates
from sparsemem.memory.slots import NONE, BankSlots, Entered
from sparsemem.memory.store import FIRST_CAPACITY, EpisodeStore
from sparsemem.memory.tape import BaseRows, Tape

SPARE = 8  # more than k are asked of the bank's index: some are touched
TIED = 256  # asked of the index at most to settle which of equally near rows come first


class BankStore(EpisodeStore):
    """What B episodes have touched of the rows of a bank; the bank stays as it is.

    A slot gets a position when a search or an access order first hands it out, and its row is
    copied then: later changes of the bank's row are not seen. A free slot holds zeros.
    """

    slots: BankSlots
    has_prefix = False

    def __init__(self, bank: MemoryBank, rows: Tensor, index_after: int | None) -> None:
        super().__init__(rows, BankSlots(bank, *rows.shape[:2]), 0.0, index_after)
        self.bank = bank
        # When a row was copied from the bank, by the bank's clock; NONE: it was not.
        self.copied = torch.full(rows.shape[:2], NONE, device=rows.device)
        self._entered: list[Entered] = []  # handed out, not loaded yet

    @staticmethod
    def start(bank: MemoryBank, batch_size: int, index_after: int | None) -> BankStore:
        """Nothing is touched yet."""
        shape = (batch_size, min(FIRST_CAPACITY, bank.num_rows), bank.width)
        rows = torch.zeros(shape, dtype=bank.computing_dtype, device=bank.keys.device)
        return BankStore(bank, rows, index_after)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` positions."""
        super().reserve(slots)
        more = self.rows.shape[1] - self.copied.shape[1]
        if more:
            self.copied = pad(self.copied, (0, more), value=NONE)
            self.slots.of = pad(self.slots.of, (0, more), value=NONE)

    def touch(self, ids: Int[Tensor, "B H S"], new: int | None = None) -> None:
        """Nothing: positions are touched when they are handed out."""

    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Positions of slots, which are touched from now on."""
        self._entered += self.slots.enter(slots)
        counts = [len(places) for places in self.slots.places]
        self.touched = torch.tensor(counts, device=self.rows.device)
        self.extent = max(counts)
        self.reserve(self.extent)
        if self._entered:
            element, position, slot = torch.tensor(self._entered, device=self.rows.device).T
            self.slots.of[element, position] = slot
        return self.slots.positions(slots)

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """Positions of the `count` least recently accessed slots; free ones come first."""
        with self.bank.table.lock.read():
            self.slots.refresh()
            slots = self.order.least_recent(count)
        return self.positions(slots)

    def load(self, erased: Int[Tensor, "B E"] | None = None) -> None:
        """Copy the rows of the positions handed out, but for those that are erased now.

        That is a use of the bank's rows, the only one in this episode.
        """
        entered = self._entered
        if entered and erased is not None:
            gone = {(b, p) for b, row in enumerate(erased.tolist()) for p in row}
            entered = [new for new in entered if (new.element, new.position) not in gone]
        if entered:
            element, position, slot = torch.tensor(entered, device=self.rows.device).T
            with self.bank.table.lock.read():
                live = self.bank.table.live[slot]
                now = self.bank.used(slot[live]) if live.any() else self.bank.book.now
                rows = self.bank.gather(slot.masked_fill(~live, NONE)).detach()
            self.rows[element, position] = rows
            self.norms[element, position] = inverse_norm(rows)
            self.copied[element, position] = torch.where(live, now, NONE)
        self._entered = []

    def write(self, ids: Tensor, weights: Tensor, words: Tensor, erase: Tensor) -> None:
        """Erase rows, then add to rows, as over a constant base."""
        self.load(erase)
        super().write(ids, weights, words, erase)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """Positions of the k best of touched rows, live rows of the bank and free slots."""
        self.bank.refresh()
        self.bank.expire()  # as reads of the bank do
        self.load()
        queries = queries.nan_to_num(0, 0, 0)  # a diverged network is the training loop's to report
        units = queries * inverse_norm(queries).unsqueeze(-1)
        touched, free = self._touched_candidates(units, k), self._free_candidates(units, k)
        best = joined_candidates(touched, free).best(k)
        slots = filled(self._with_base(queries, best, k), self.num_slots)
        positions = self.positions(slots.flatten(1)).view_as(slots)
        self.load()
        return positions

    def _touched_candidates(self, units: Float[Tensor, "B H W"], k: int) -> Candidates:
        """The k best touched rows, or what an index proposes for them."""
        shape, start, parts = units.shape[:2], 0, []
        if self.absorb():
            start = int(self.touched.min())  # rows that all episodes have touched
        if start >= k:
            assert self.trees is not None
            rows, norms = self.rows[:, :start], self.norms[:, :start]
            positions, scores = self.trees.candidates(units, k, rows, norms)
            slots = self.slots.of.gather(1, positions.flatten(1)).view_as(positions)
            parts.append(Candidates(slots.masked_fill(scores == -torch.inf, NONE), scores))
        rows, norms = self.rows[:, start : self.extent], self.norms[:, start : self.extent]
        scores = torch.bmm(units, rows.mT) * norms.unsqueeze(1)
        slots = self.slots.of[:, start : self.extent].unsqueeze(1).expand(*shape, -1)
        return joined_candidates(*parts, Candidates(slots, scores)).best(k)

    def _free_candidates(self, units: Float[Tensor, "B H W"], k: int) -> Candidates:
        """The first k untouched free slots: they are equal, and have the lowest ids."""
        with self.bank.table.lock.read():
            self.slots.refresh()
            slots = self.slots.untouched_free(k)
        slots = slots.unsqueeze(1).expand(-1, units.shape[1], -1)
        return Candidates(slots, units.new_zeros(slots.shape))

    def _with_base(
        self, queries: Float[Tensor, "B H W"], best: Candidates, k: int
    ) -> Int[Tensor, "B H K"]:
        """Slots of the k best of what was found and of the bank's untouched live rows.

        The index is asked deeper, twice as deep each time, until nothing better can follow.
        """
        result, heads = best.slots.flatten(0, 1).clone(), queries.shape[1]
        queries, best = queries.flatten(0, 1), Candidates(*(part.flatten(0, 1) for part in best))
        left = torch.arange(len(queries) if self.bank.table.num_live else 0, device=queries.device)
        asked = k + SPARE
        while len(left):
            asked = min(asked, self.num_slots)
            found = self.bank.index.search(queries[left], asked)
            slots = self.slots.untouched(found.ids, (left // heads).tolist())
            known = Candidates(best.slots[left], best.scores[left])
            result_of = joined_candidates(known, Candidates(slots, found.scores)).best(k)
            settled = is_settled(found, result_of) | (asked == self.num_slots)
            result[left[settled]] = result_of.slots[settled]
            left = left[~settled]
            asked *= 2
        return result.view(-1, heads, k)

    @property
    def slot_table(self) -> Int[Tensor, "B M"]:
        """Slots of the positions, -1 for those that are not handed out."""
        return self.slots.of

    def check_ids(self, name: str, ids: Tensor) -> None:
        """Refuse positions that were not handed out."""
        limit = self.touched.view(-1, *[1] * (ids.ndim - 1))
        wrong = (ids < 0) | (ids >= limit)
        if wrong.any():
            element = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"{name} holds position {int(ids[wrong][0])} in episode {element}, expected"
                f" 0 .. {int(self.touched[element]) - 1}: positions that search, least_recent or"
                " positions have given out"
            )

    def open(self, token: Tensor, tape: Tape) -> Tensor:
        """The token with which a tape begins: gradients reach the bank through it."""
        if not (torch.is_grad_enabled() and self.bank.keys.requires_grad):
            return token
        return BaseRows.apply(token, self.bank.keys, tape)  # type: ignore[no-untyped-call, no-any-return]

    def base_gradient(self, ids: Int[Tensor, "B n"], values: Float[Tensor, "B n W"]) -> Tensor:
        """The bank's row-sparse gradient from that of rows at positions (-1: none)."""
        at = ids.clamp(min=0)
        copied, slots = self.copied.gather(1, at), self.slots.of.gather(1, at)
        kept = (ids >= 0) & (copied >= 0)
        kept &= self.bank.book.written[slots.clamp(min=0)] <= copied  # else it is another row now
        slots, keys = slots[kept], self.bank.keys
        if not len(slots):
            return torch.sparse_coo_tensor(
                slots.unsqueeze(0), keys[:0], keys.shape, check_invariants=False
            )
        with torch.enable_grad():
            rows = self.bank.gather(slots)
        (gradient,) = torch.autograd.grad(rows, keys, values[kept])
        return gradient

    def to(self, device: torch.device, dtype: torch.dtype) -> BankStore:
        """An independent copy, where the bank is."""
        bank = self.bank
        if (device, dtype) != (bank.keys.device, bank.computing_dtype):
            raise TypeError(
                f"an episode over a bank of {bank.computing_dtype} on {bank.keys.device} cannot"
                f" go to {dtype} on {device}: move the bank"
            )
        self.load()
        copy = BankStore(bank, self.rows.to(device, dtype, copy=True), self.index_after)
        copy.slots = self.slots.copy()
        copy.touched, copy.extent = self.touched.to(device, copy=True), self.extent
        copy.order = self.order.to(device, copy.slots)
        copy.copied = self.copied.to(device, copy=True)
        return copy


def is_settled(found: Found, best: Candidates) -> Bool[Tensor, " Q"]:
    """Whether no row that an index did not return can be among the best of all.

    Such a row has a lower score than the last one returned, or the same and a higher id.
    """
    cells, last_id = on_grid(found.scores), found.ids[:, -1]
    last, edge = cells[:, -1], on_grid(best.scores)[:, -1]
    # Scores may be equal on the grid only: then a row that was not returned may have any id.
    level = ((cells != cells[:, -1:]) | (found.scores == found.scores[:, -1:])).all(1)
    first = level & (best.slots[:, -1] <= last_id)
    tied = (last == edge) & (first | (found.ids.shape[1] >= TIED))
    return (last_id < 0) | (best.slots[:, -1] >= 0) & ((last < edge) | tied)


def filled(slots: Int[Tensor, "B H K"], num_slots: int) -> Int[Tensor, "B H K"]:
    """Slots with other slots in place of -1, where an approximate index found too few."""
    if bool((slots >= 0).all()):
        return slots
    others = torch.arange(min(2 * slots.shape[2], num_slots), device=slots.device)
    repeated = (slots.unsqueeze(-1) == others).any(2)
    others = others.masked_fill(repeated, num_slots).sort(2).values
    missing = slots < 0
    return torch.where(missing, others.gather(2, (missing.cumsum(2) - 1).clamp(min=0)), slots)
