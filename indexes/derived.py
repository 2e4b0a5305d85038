"""One FAISS index derived from a table, and what it does not know yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sparsemem.indexes.kinds import (
    ASSIGNMENT_PROBES,
    faiss_module,
    from_numpy,
    is_quantised,
    knob_of,
    new_faiss_index,
    num_lists,
    quicken,
    search_parameters,
    to_faiss,
    updates_in_place,
)
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

SPARE = 8  # candidates beyond k: FAISS's float32 scores differ from the rows' own by rounding
DEEPER = 8  # how many times more candidates are asked for when too many were stale
MOST_CANDIDATES = 2_048  # where even these are too few, a scan says what is true
QUANTISED = 4  # times k candidates where the index scores something coarser than the rows
START_EFFORT = 16
BUILD_CHUNK = 16_384  # rows read at once
LEAST_TRAINING = 10_000


class Setting(NamedTuple):
    """How hard a search looks: the value of the knob, and candidates asked for, in units of k."""

    effort: int
    oversample: int


class Abandoned(Exception):
    """The work was given up because everything is to stop."""


class Derived:
    """A FAISS index whose entries are proposals of rows.

    FAISS counts what is added to it: the count at that time is the entry's *label*. `row_of`
    says which row it was, `label_of` which label is a row's latest. An entry is valid while it is
    its row's latest, the row is live, and it is not *dirty* (changed and not absorbed yet). The
    dirty rows are the *buffer*, which is to be searched exactly. So nothing stale gets out, even
    of kinds that can neither update nor remove.
    """

    def __init__(self, table: RowTable, metric: Metric, name: str) -> None:
        self.table, self.metric = table, metric
        self.faiss = new_faiss_index(name, table.width, metric)
        self.in_place = updates_in_place(self.faiss)
        self.knob = knob_of(self.faiss)
        oversample = QUANTISED if is_quantised(self.faiss) else 1
        self.start = Setting(min(START_EFFORT, self.knob.limit), oversample)  # before tuning
        self.setting = self.start
        self.holds = True  # the floor of the recall, at that setting
        # Lazily zero: one more than the label, so that 0 is none.
        self.label_of = np.zeros(table.num_rows, np.int64)
        self.dirty = np.zeros(table.num_rows, np.bool_)
        self.row_of = np.empty(0, np.int64)
        self.absorbed = 0  # rows changed since it was built
        self._buffer = np.empty(1024, np.int64)
        self.buffered = 0
        self._quantisers: tuple[Any, ...] = ()  # kept alive

    @property
    def buffer(self) -> Any:
        """Ids of the rows that are dirty, oldest first."""
        return self._buffer[: self.buffered]

    @property
    def entries(self) -> int:
        """Entries, valid or not."""
        return int(self.faiss.ntotal)

    def build(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train on a sample of the live rows, and add them all; Abandoned once `stopped()`.

        Rows are read without the lock: one that is changed meanwhile is marked afterwards.
        """
        live = self.table.live[: self.table.extent].cpu().nonzero().squeeze(1)
        lists = num_lists(self.faiss)
        wanted = max(LEAST_TRAINING, 64 * lists)
        step = max(1, len(live) // wanted)
        self.faiss.train(self._vectors(live[::step].to(self.table.live.device)))
        self._quantisers = quicken(self.faiss)
        if self.in_place:
            self.faiss.set_direct_map_type(faiss_module().DirectMap.Array)
        for start in range(0, len(live), BUILD_CHUNK):
            ids = live[start : start + BUILD_CHUNK]
            if stopped():
                raise Abandoned
            self._add(ids.numpy(), self._vectors(ids.to(self.table.live.device)))
        if self._quantisers:
            self._quantisers[-1].nprobe = ASSIGNMENT_PROBES

    def mark(self, ids: Any) -> None:
        """Rows [n] (numpy) have changed: they are searched exactly until they are absorbed."""
        new = np.unique(ids[~self.dirty[ids]])
        end = self.buffered + len(new)
        if end > len(self._buffer):
            grown = np.empty(2 * end, np.int64)
            grown[: self.buffered] = self.buffer
            self._buffer = grown
        self._buffer[self.buffered : end] = new
        self.dirty[new] = True
        self.buffered = end

    def absorb(self, count: int) -> None:
        """Take the `count` oldest rows of the buffer into the index."""
        ids = self.buffer[:count].copy()
        live = self.table.live.index_select(0, from_numpy(ids, self.table.live)).cpu().numpy()
        present = ids[live]  # the entries of the others are hidden as long as they are not live
        vectors = self._vectors(from_numpy(present, self.table.live))
        known = self.label_of[present] > 0 if self.in_place else np.zeros(len(present), np.bool_)
        if known.any():
            self.faiss.update_vectors(self.label_of[present[known]] - 1, vectors[known])
        if not known.all():
            self._add(present[~known], vectors[~known])
        self.dirty[ids] = False
        self.absorbed += len(ids)
        left = self.buffered - len(ids)
        self._buffer[:left] = self._buffer[len(ids) : self.buffered].copy()
        self.buffered = left

    def candidates(
        self, queries: Tensor, k: int, setting: Setting | None = None
    ) -> tuple[Tensor, Any]:
        """Ids [Q, C] of valid entries, -1 after them; and for which queries that may not be all.

        Those are queries near which so many entries are stale that k valid ones did not turn up.
        """
        effort, oversample = setting or self.setting
        vectors = to_faiss(queries, self.metric)
        width = wanted = min(k * oversample + SPARE, self.entries)
        ids, exhausted = self._proposals(vectors, wanted, effort)
        short = ((ids >= 0).sum(1) < k) & ~exhausted
        while short.any() and wanted < min(self.entries, MOST_CANDIDATES):
            wanted = min(wanted * DEEPER, self.entries, max(MOST_CANDIDATES, width))
            deeper, emptied = self._proposals(vectors[short], wanted, effort)
            first = np.argsort(deeper < 0, axis=1, kind="stable")[:, :width]  # the best valid ones
            ids[short] = np.take_along_axis(deeper, first, 1)
            short[short] = ((ids[short] >= 0).sum(1) < k) & ~emptied
        return from_numpy(ids, queries), short

    def imbalance(self) -> float:
        """How uneven the lists are: 1 is even; n: a search takes about n times as long."""
        lists = faiss_module().try_extract_index_ivf(self.faiss)
        return 1.0 if lists is None else float(lists.invlists.imbalance_factor())

    def stale(self) -> int:
        """Entries that are not valid, at least: rows gone or entered again under a new label."""
        return max(0, self.entries - self.table.num_live) + self.buffered

    def num_bytes(self) -> int:
        """Memory of the entries and of what is known of them, about."""
        try:
            code = self.faiss.sa_code_size()
        except RuntimeError:
            code = 4 * self.table.width
        return self.entries * (int(code) + 8 + 8) + self.table.extent * 9 + self._buffer.nbytes

    def _proposals(self, vectors: Any, wanted: int, effort: int) -> tuple[Any, Any]:
        """Valid ids [Q, wanted] or -1, and for which queries the index had no more entries."""
        labels = self.faiss.search(vectors, wanted, params=search_parameters(self.faiss, effort))[1]
        ids = self.row_of[labels]  # label -1 takes the last: it is not valid below
        live = self.table.live.index_select(0, from_numpy(ids.ravel(), self.table.live))
        valid = (self.label_of[ids] == labels + 1) & (labels >= 0) & ~self.dirty[ids]
        valid &= live.cpu().numpy().reshape(ids.shape)
        return np.where(valid, ids, -1), (labels < 0).any(1)

    def _vectors(self, ids: Tensor) -> Any:
        return to_faiss(self.table.take(ids), self.metric)

    def _add(self, ids: Any, vectors: Any) -> None:
        first = self.entries
        if first + len(ids) > len(self.row_of):
            grown = np.zeros(max(first + len(ids), 2 * first), np.int64)
            grown[:first] = self.row_of[:first]
            self.row_of = grown
        self.row_of[first : first + len(ids)] = ids
        self.faiss.add(vectors)
        # Only now, so that an interrupted call leaves entries that are not valid.
        self.label_of[ids] = np.arange(first + 1, first + len(ids) + 1)


def ladder(limit: int) -> list[int]:
    """Values of a knob to try: 1, 2, 3, 4, 6, 8, 12, ... limit."""
    steps = {limit}
    value = 1
    while value <= limit:
        steps |= {value, min(limit, value + value // 2)}
        value *= 2
    return sorted(steps)
