"""Changed rows beside an index: packed, so that a scan of them needs no gathering."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.indexes.base import MISSING, Found
from sparsemem.indexes.compiling import loops_for
from sparsemem.indexes.exact import BLOCK_ROWS, best_rows, upper_bounds
from sparsemem.indexes.kinds import to_faiss
from sparsemem.indexes.lists import OFFSET_BITS, squares
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.scoring import TableScoring
from sparsemem.indexes.table import RowTable

FIRST_CAPACITY = 1_024


class Known(NamedTuple):
    """What an index knows of rows and of its lists."""

    label_of: Any  # [N]: one more than a row's label; 0: it has none
    places: Any  # [labels]: FAISS's direct map
    chosen: Any  # [N]: squared distance from the centroid when the list was chosen
    centroids: Any  # [L, W]


class Buffer:
    """Rows of a table that an index does not know as they are now.

    A row has a *place* here from its first change until it is dropped; then one of the last takes
    its place. It *waits* to be looked at, in the order of the changes, until it is dropped or is
    told to rest: then it stays. `marks` counts changes, so that who has looked at a row can see
    whether it was changed since. What changes anything is called under the table's write lock; a
    scan under its read lock.
    """

    def __init__(self, table: RowTable) -> None:
        self.table = table
        self.count = self.waiting = 0
        self.marked = 0  # rows so far, as often as they changed and were not settled
        self.changes = 0  # calls of `mark`
        # By row, lazily zero: one more than its place; its latest change; whether it waits.
        self.place = np.zeros(table.num_rows, np.int32)
        self.marks = np.zeros(table.num_rows, np.int64)
        self.waits = np.zeros(table.num_rows, np.bool_)
        self._ids = np.empty(FIRST_CAPACITY, np.int64)
        self._rows = torch.empty(
            FIRST_CAPACITY, table.width, dtype=table.dtype, device=table.rows.device
        )
        self._queue: deque[Any] = deque()  # arrays of ids; those that no longer wait may be in it
        self._queued = 0  # ids in them
        self._recent: list[Any] = []  # arrays of ids that changed since `take_recent`
        self._num_recent = 0

    @property
    def ids(self) -> Any:
        """Ids [count] of the rows, by place."""
        return self._ids[: self.count]

    @property
    def strays(self) -> int:
        """Rows that were looked at and stay."""
        return self.count - self.waiting

    def holds(self, ids: Any) -> Any:
        """Which of the rows (numpy, any shape) are here."""
        return self.place[ids] > 0

    def mark(self, ids: Any) -> None:
        """Rows [n] (numpy, distinct) have changed."""
        self.changes += 1
        self.marked += len(ids)
        self._reserve(self.count + len(ids))
        idle = self._mark(ids)
        self.waiting += len(idle)
        self._enqueue(idle)
        self._recent.append(ids)
        self._num_recent += len(ids)
        if self._num_recent > 2 * self.waiting + FIRST_CAPACITY:  # most are the same rows
            self._recent = [self.take_recent()]
            self._num_recent = len(self._recent[0])

    def take_recent(self) -> Any:
        """Ids (distinct) of rows that wait and were changed since the last call."""
        parts, self._recent, self._num_recent = self._recent, [], 0
        ids = parts[0] if len(parts) == 1 else np.unique(np.concatenate([self._ids[:0], *parts]))
        return ids[self.waits[ids]]

    def _mark(self, ids: Any) -> Any:
        """Place rows, and say which of them did not wait before."""
        rows, loops = self.table.take(self._tensor(ids)), loops_for(self._rows)
        if loops is not None:
            idle = np.empty_like(ids)
            held = (self.place, self.marks, self.waits, self._ids, self._rows.numpy())
            made = loops.mark(ids, rows.numpy(), self.changes, self.count, *held, idle)
            self.count = made[0]
            return idle[: made[1]]
        new = ids[self.place[ids] == 0]
        end = self.count + len(new)
        self._ids[self.count : end] = new
        self.place[new] = np.arange(self.count + 1, end + 1)
        self.count = end
        places = self._tensor(self.place[ids].astype(np.int64) - 1)
        self._rows.index_copy_(0, places, rows)
        self.marks[ids] = self.changes
        idle = ids[~self.waits[ids]]
        self.waits[idle] = True
        return idle

    def waiting_longest(self, count: int) -> Any:
        """The ids of `count` rows that have waited longest, or of all; they go on waiting."""
        found = [np.empty(0, np.int64)]
        front: list[Any] = []
        while count > 0 and self._queue:
            queued = self._queue.popleft()
            ids = queued[self.waits[queued]]
            self._queued -= len(queued) - len(ids)
            if len(ids):
                front.append(ids)
            found.append(ids[:count])
            count -= len(found[-1])
        self._queue.extendleft(reversed(front))
        return np.unique(np.concatenate(found))

    def rest(self, ids: Any) -> None:
        """Rows [n] (distinct) need not be looked at again until they are changed."""
        self.waiting -= int(self.waits[ids].sum())
        self.waits[ids] = False

    def drop(self, ids: Any) -> None:
        """Rows [n] (distinct) that are here leave."""
        if (loops := loops_for(self._rows)) is not None:
            held = (self.place, self.waits, self._ids, self._rows.numpy())
            self.count, waited = loops.drop(ids, self.count, *held)
            self.waiting -= waited
            return
        self.rest(ids)
        count = self.count - len(ids)
        holes = self.place[ids].astype(np.int64) - 1
        self.place[ids] = 0
        # Rows behind the new end move into the holes before it.
        behind = self._ids[count : self.count]
        stay = np.flatnonzero(self.place[behind] > 0) + count
        holes = holes[holes < count]
        moved = self._ids[stay]
        self._ids[holes] = moved
        self.place[moved] = holes + 1
        self._rows.index_copy_(0, self._tensor(holes), self._rows[self._tensor(stay)])
        self.count = count

    def staying(
        self, metric: Metric, ids: Any, known: Known, usual: float, farther: float
    ) -> tuple[Any, Any, Any, Any]:
        """Rows [n] that are here, in the index too, and still belong where their entries are.

        That is as near, squared, to their lists' centroids as `usual`, or as `farther` times the
        distance at which the lists were chosen. Their ids, labels, lists, and vectors [m, W] as
        FAISS sees them.
        """
        if (loops := loops_for(self._rows)) is not None:
            kept, labels, lists = np.empty_like(ids), np.empty_like(ids), np.empty_like(ids)
            vectors = np.empty((len(ids), self.table.width), np.float32)
            made = (kept, labels, lists, vectors)
            given = (*known, self.place, self._rows.numpy(), usual, farther)
            count = loops.staying(ids, *given, metric is Metric.cosine, *made)
            return kept[:count], labels[:count], lists[:count], vectors[:count]
        ids = ids[known.label_of[ids] > 0]
        labels = known.label_of[ids] - 1
        lists = known.places[labels] >> OFFSET_BITS
        vectors = to_faiss(self.table.take(self._tensor(ids)), metric)
        away = squares(vectors, known.centroids[lists])
        near = away <= np.maximum(usual, farther * known.chosen[ids])
        return ids[near], labels[near], lists[near], vectors[near]

    def scan(self, metric: Metric, queries: Float[Tensor, "Q W"], k: int) -> Found:
        """The k best of the rows, exactly: by score, then id."""
        ids = self._tensor(self.ids)

        def blocks() -> Iterable[tuple[Tensor, Tensor]]:
            return zip(
                torch.split(ids, BLOCK_ROWS),
                torch.split(self._rows[: self.count], BLOCK_ROWS),
                strict=True,
            )

        def ordered() -> Iterable[tuple[Tensor, Tensor]]:
            places = ids.argsort()
            for part in torch.split(places, BLOCK_ROWS):
                yield ids[part], self._rows[part]

        return best_rows(TableScoring(self.table, metric), queries, k, blocks, ordered)

    def above(
        self, metric: Metric, queries: Float[Tensor, "Q W"], floor: Float[Tensor, " Q"], most: int
    ) -> Int[Tensor, "Q C"] | None:
        """Ids of all rows that may be worth `floor` or more, for each query, then -1.

        None where these would be more than `most` a query on the average: then scan.
        """
        bounds = upper_bounds(metric, queries, self._rows[: self.count])
        which, places = (bounds >= floor.unsqueeze(1)).nonzero(as_tuple=True)
        if len(which) > most * len(queries):
            return None
        counts = which.bincount(minlength=len(queries))
        column = torch.arange(len(which), device=which.device) - (counts.cumsum(0) - counts)[which]
        ids = which.new_full((len(queries), int(counts.max())), MISSING)
        ids[which, column] = self._tensor(self.ids)[places]
        return ids

    def _enqueue(self, ids: Any) -> None:
        if len(ids):
            self._queue.append(ids)
            self._queued += len(ids)
        if self._queued > 2 * self.waiting + FIRST_CAPACITY:  # most no longer wait
            queued = np.concatenate(self._queue)
            queued = queued[self.waits[queued]]
            first = np.sort(np.unique(queued, return_index=True)[1])
            self._queue, self._queued = deque([queued[first]]), len(first)

    def num_bytes(self) -> int:
        """Memory of the rows and of the marks that can have been touched, about."""
        return int(self._rows.nbytes + self._ids.nbytes + 13 * self.table.extent)

    def _reserve(self, count: int) -> None:
        if count <= len(self._ids):
            return
        ids = np.empty(2 * count, np.int64)
        rows = self._rows.new_empty(2 * count, self.table.width)
        ids[: self.count], rows[: self.count] = self.ids, self._rows[: self.count]
        self._ids, self._rows = ids, rows

    def _tensor(self, ids: Any) -> Tensor:
        return torch.from_numpy(ids).to(self._rows.device)
