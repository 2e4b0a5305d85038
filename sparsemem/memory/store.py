"""EpisodeStore: the rows that a batch of episodes has touched, over a constant base."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem import devices
from sparsemem.indexes.metrics import inverse_norm
from sparsemem.indexes.ranking import top_k
from sparsemem.memory.row_tree import RowTrees
from sparsemem.memory.slots import Slots
from sparsemem.memory.tape import Tape, flatten_ids
from sparsemem.memory.usage import AccessOrder

FIRST_CAPACITY = 64
# A table grows, once the host has waited to know how full it is, where it is fuller than this, or
# has no room for so many calls as this one: it is not to wait again soon.
FULL, STEPS_AHEAD = 0.75, 16


class EpisodeStore:
    """What B episodes have touched of N slots of width W; advanced in place.

    A *position* is a place in the growing table of rows. Over a constant base, position i is
    slot i: the touched slots are always a prefix (docs/architecture.md). Rows behind the touched
    ones hold the base.

    On a device the host does not see what is touched, and `extent` is what it can be at most: each
    operation adds as much as it may touch. It is read back where the table would have to grow.
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
        self.extent = 0  # touched slots of the element that has most; on a device, at most
        self.order = AccessOrder(batch_size, slots, rows.device)
        self.order.grow(rows.shape[1])
        self.version = 0
        self.index_after = index_after
        # On a device a search is a scan at any length.
        self.trees: RowTrees | None = None
        if index_after is not None and not devices.is_device(rows):
            self.trees = RowTrees(batch_size, width, index_after)
        self._spare: list[Tensor] = []  # gradient buffers, all zero

    @property
    def is_bounded(self) -> bool:
        """Whether `extent` is a bound: the host does not see how many slots are touched."""
        return self.has_prefix and devices.is_device(self.rows)

    def exact_extent(self) -> int:
        """Touched slots of the element that has most; on a device the host waits for that."""
        if self.has_prefix:
            self.extent = int(self.touched.max())
        return self.extent

    def visible(self, count: int) -> int:
        """How many positions hold all touched ones and `count` more, or all; makes room for them.

        The untouched ones among them stand for all untouched ones.
        """
        self.reserve(self.extent + count)
        return min(self.extent + count, self.num_slots)

    def reserve(self, slots: int) -> None:
        """Make room for `slots` positions (twice as many as before, at least).

        `slots` is `extent` and what comes behind it. Where that was a bound the host waits for the
        extent itself, which is smaller from then on, and often nothing has to be done.
        """
        if min(slots, self.num_slots) <= self.rows.shape[1]:
            return
        if self.is_bounded and not devices.is_capturing(self.rows):
            bound = self.extent
            ahead = STEPS_AHEAD * (slots - bound)
            slots -= bound - self.exact_extent()
            if max(slots + ahead, slots / FULL) <= self.rows.shape[1]:
                return
            slots += ahead
        self._grow(min(slots, self.num_slots))

    def _grow(self, slots: int) -> None:
        batch_size, old, width = self.rows.shape
        capacity = min(max(slots, 2 * old), self.num_slots)
        rows = self.rows.new_full((batch_size, capacity, width), self.base)
        norms = inverse_norm(rows[:1, -1:]).repeat(batch_size, capacity)
        rows[:, :old], norms[:, :old] = self.rows, self.norms
        self.rows, self.norms = rows, norms
        self.order.grow(capacity)

    def touch(self, ids: Int[Tensor, "B H S"], new: int | None = None) -> None:
        """Count positions as touched, and make room for them.

        `new` says that not more than so many of an episode's are beyond its touched ones.
        """
        if ids.shape[2]:
            self.touched = torch.maximum(self.touched, ids.amax((1, 2)) + 1)
            if new is None or not self.is_bounded:
                self.extent = int(self.touched.max())
            else:
                self.extent = min(self.extent + new, self.num_slots)
        self.reserve(self.extent)

    def positions(self, slots: Int[Tensor, "B n"]) -> Int[Tensor, "B n"]:
        """Positions of slots."""
        return slots

    def least_recent(self, count: int) -> Int[Tensor, "B count"]:
        """Positions of the `count` least recently accessed slots."""
        if self.is_bounded:
            return self.order.scan(count, self.visible(count))
        return self.order.least_recent(count)

    def write(self, ids: Tensor, weights: Tensor, words: Tensor, erase: Tensor) -> None:
        """Erase rows `erase` [B, E], then add weights [B, H, S] times words [B, H, W] at ids.

        All of them are touched.
        """
        table, capacity = self.rows.view(-1, self.rows.shape[-1]), self.rows.shape[1]
        flat = flatten_ids(ids, capacity)
        erased = flatten_ids(erase, capacity)
        table.index_fill_(0, erased, 0)
        added = weights.unsqueeze(-1) * words.unsqueeze(2)
        table.index_add_(0, flat, added.flatten(0, 2))
        changed = torch.cat([flat, erased])
        self.norms.view(-1).index_copy_(0, changed, inverse_norm(table.index_select(0, changed)))
        if self.trees is not None:
            self.trees.update(torch.cat([ids.flatten(1), erase], 1), self.rows, self.norms)

    def search(self, queries: Tensor, k: int) -> Tensor:
        """The k rows of largest cosine to queries [B, H, W], best first, ties by slot: [B, H, k].

        The first k untouched slots stand for the whole untouched base: they are equal, and
        have the lowest ids of all that are.
        """
        visible = self.visible(k)
        scaled = queries * inverse_norm(queries).unsqueeze(-1)
        if self.trees is not None and self.absorb():
            rows, norms = self.rows[:, :visible], self.norms[:, :visible]
            candidates, scores = self.trees.candidates(scaled, k, rows, norms)
            return candidates.gather(2, top_k(scores, k))
        scores = torch.bmm(scaled, self.rows[:, :visible].mT)
        return top_k(scores * self.norms[:, :visible].unsqueeze(1), k)

    def absorb(self) -> bool:
        """Whether rows are found by trees, which are told of all that are new."""
        trees = self.trees
        if trees is None or self.extent < trees.minimum:
            return False
        return trees.absorb(self.touched, self.rows, self.norms)

    def propose(self, queries: Float[Tensor, "B H W"], k: int) -> tuple[int, Int[Tensor, "B H C"]]:
        """After `absorb`: where the rows to be scanned begin, and candidates before it."""
        assert self.trees is not None, "there are trees"
        start = min(int(self.trees.entered.min()), self.num_slots - k)
        return start, self.trees.proposed(queries, k)

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
        copy.extent = self.extent if copy.is_bounded else int(copy.touched.max())
        copy.order = self.order.to(device, copy.slots)
        if copy.trees is not None and self.trees is not None:
            copy.trees = self.trees.copy()
        return copy


def check_slots(name: str, ids: Tensor, num_slots: int) -> None:
    """Refuse slots that there are not."""
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < num_slots:
        wrong = ids[(ids < 0) | (ids >= num_slots)][0]
        raise ValueError(f"{name} holds slot {int(wrong)}, expected 0 .. {num_slots - 1}")
