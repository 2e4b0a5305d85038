"""EpisodeStore: the rows that a batch of episodes has touched, over a constant base."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.metrics import inverse_norm
from sparsemem.indexes.ranking import top_k
from sparsemem.indexes.sealed import SealedRows
from sparsemem.memory.slots import Slots
from sparsemem.memory.tape import Tape, flatten_ids
from sparsemem.memory.usage import AccessOrder

FIRST_CAPACITY = 64


class EpisodeStore:
    """What B episodes have touched of N slots of width W; advanced in place.

    A *position* is a place in the growing table of rows. Over a constant base, position i is
    slot i: the touched slots are always a prefix (docs/architecture.md). Rows behind the touched
    ones hold the base.
    """

    slots: Slots
    has_prefix = True  # positions are slots, and the touched ones a prefix

    def __init__(self, rows: Tensor, slots: Slots, base: float, index_after: int | None) -> None:
        batch_size, _, width = rows.shape
        self.num_slots = slots.num_slots
        self.slots = slots
        self.base = base
        self.rows = rows  # [B, capacity, W]
        self.norms = inverse_norm(rows)  # of each row
        self.touched = torch.zeros(batch_size, dtype=torch.int64, device=rows.device)
        self.extent = 0  # touched slots of the element that has most
        self.order = AccessOrder(batch_size, slots, rows.device)
        self.order.grow(rows.shape[1])
        self.version = 0
        self.index_after = index_after
        self.sealed = None if index_after is None else SealedRows(batch_size, width, index_after)
        self._spare: list[Tensor] = []  # gradient buffers, all zero

    def reserve(self, slots: int) -> None:
        """Make room for `slots` positions (twice as many as before, at least)."""
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
        """Count positions as touched."""
        if ids.shape[2]:
            self.touched = torch.maximum(self.touched, ids.amax((1, 2)) + 1)
            self.extent = int(self.touched.max())

    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Positions of slots."""
        return slots

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """Positions of the `count` least recently accessed slots."""
        return self.order.least_recent(count)

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
        if self.sealed is not None and self.absorb():
            rows, norms = self.rows[:, :visible], self.norms[:, :visible]
            candidates, scores = self.sealed.candidates(scaled, k, rows, norms)
            return candidates.gather(2, top_k(scores, k))
        scores = torch.bmm(scaled, self.rows[:, :visible].mT)
        return top_k(scores * self.norms[:, :visible].unsqueeze(1), k)

    def absorb(self) -> bool:
        """Whether older rows are searched by an index, which is told of those now due."""
        sealed = self.sealed
        if sealed is None or self.extent < sealed.minimum:
            return False
        return sealed.absorb(self.touched, self.rows, self.norms)

    def propose(self, queries: Float[Tensor, "B H W"], k: int) -> tuple[int, Int[Tensor, "B H C"]]:
        """After `absorb`: where the rows to be scanned begin, and candidates before it."""
        assert self.sealed is not None, "there is an index"
        start = min(self.sealed.sealed, self.extent, self.num_slots - k)
        return start, self.sealed.proposed(queries, k)

    @property
    def slot_table(self) -> Int[Tensor, "B M"] | None:
        """Slots of the positions; None where a position is its slot."""
        return None

    def check_ids(self, name: str, ids: Tensor) -> None:
        """Refuse positions that there are not."""
        check_slots(name, ids, self.num_slots)

    def open(self, token: Tensor, tape: Tape) -> Tensor:
        """The token with which a tape begins."""
        return token

    def base_gradient(self, ids: Int[Tensor, "B n"], values: Float[Tensor, "B n W"]) -> Tensor:
        """The gradient of what lies under the rows; a constant has none."""
        raise AssertionError("only a bank's rows take gradients")

    def load(self) -> None:
        """Make every touched row hold what it stands for."""

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
        copy = EpisodeStore(rows, self.slots, self.base, self.index_after)
        copy.touched = self.touched.to(device, copy=True)
        copy.extent, copy.order = self.extent, self.order.to(device, copy.slots)
        return copy


def check_slots(name: str, ids: Tensor, num_slots: int) -> None:
    """Refuse slots that there are not."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_slots:
        wrong = ids[(ids < 0) | (ids >= num_slots)][0]
        raise ValueError(f"{name} holds slot {int(wrong)}, expected 0 .. {num_slots - 1}")
