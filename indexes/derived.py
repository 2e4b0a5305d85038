"""One FAISS index derived from a table, and what it does not know yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparsemem.indexes.base import Found, best_of
from sparsemem.indexes.buffer import Buffer, Known
from sparsemem.indexes.compiling import loops_for
from sparsemem.indexes.derivation import (
    LEAST_TRAINING,
    MOST_STRAYS,
    QUANTISED,
    SPARE,
    START_EFFORT,
    Abandoned,
    Derivation,
    Setting,
)
from sparsemem.indexes.kinds import (
    ASSIGNMENT_PROBES,
    add_to_lists,
    encodes_quickly,
    enter_in_place,
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
from sparsemem.indexes.lists import Lists
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.scoring import TableScoring
from sparsemem.indexes.table import RowTable

DEEPER = 8  # how many times more candidates are asked for when too many were stale
MOST_CANDIDATES = 2_048  # where even these are too few, a scan says what is true
BUILD_CHUNK = 16_384  # rows read at once
NOWHERE = -1
FARTHER = 1.05  # times the squared distance at which a list was chosen: it need not be again
FEW = 4_096  # rows of the buffer of which it pays to look at those alone that are good enough


class Batch(NamedTuple):
    """Rows that wait in the buffer, and the marks of their changes so far."""

    ids: Any  # [n]
    marks: Any  # [n]
    lists: Any  # [n]: where their entries are; NOWHERE: not known, or there are none


class Prepared(NamedTuple):
    """What is to be entered of a batch, and where."""

    batch: Batch
    vectors: Any  # [n, W]
    lists: Any  # [n]; None: the index says
    far: Any  # bool [n]: strays
    chosen: Any  # [n]: squared distances of those whose lists were looked for, else as they were


class Derived(Derivation):
    """A FAISS index whose entries are proposals of rows.

    FAISS counts what is added to it: the count at that time is the entry's *label*. `row_of`
    says which row it was, `label_of` which label is a row's latest. An entry is valid while it is
    its row's latest, the row is live, and it is not in the *buffer* of rows that were changed and
    not absorbed yet, which is to be searched exactly. So nothing stale gets out, even of kinds
    that can neither update nor remove.

    Rows are absorbed in three parts, so that searches and writers hardly wait: `begin` says which,
    `prepare`, without any lock, finds their lists, `finish` enters those that were not changed
    meanwhile. Most rows move little and need no search for their lists: `settle` enters those
    that are as near to their lists' centroids as is usual, or as they were before, in one go. A
    *stray* is a row so far from every list's centroid that no search would find it without looking
    through many lists: it stays in the buffer.
    """

    buffer: Buffer

    def __init__(self, table: RowTable, metric: Metric, name: str) -> None:
        self.table, self.metric, self.scoring = table, metric, TableScoring(table, metric)
        self.faiss = new_faiss_index(name, table.width, metric)
        self.in_place = updates_in_place(self.faiss)
        self.knob = knob_of(self.faiss)
        oversample = QUANTISED if is_quantised(self.faiss) else 1
        self.start = Setting(min(START_EFFORT, self.knob.limit), oversample)  # before tuning
        self.setting = self.start
        self.holds = True  # the floor of the recall, at that setting
        # Lazily zero: one more than the label, so that 0 is none.
        self.label_of = np.zeros(table.num_rows, np.int64)
        self.row_of = np.empty(0, np.int64)
        # Squared distance of a row from its list's centroid when the list was chosen.
        self.chosen = np.zeros(table.num_rows, np.float32)
        self.buffer = Buffer(table)
        self.absorbed = 0  # rows that came or took another place since it was built
        self._settles = False  # from when it is built on, where codes are quickly made
        self.lists: Lists | None = None
        self._quantisers: tuple[Any, ...] = ()  # kept alive
        self._made: dict[int, Any] = {}  # parameters of searches, by effort

    @property
    def entries(self) -> int:
        """Entries, valid or not."""
        return int(self.faiss.ntotal)

    def build(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train on a sample of the live rows, and add them all; Abandoned once `stopped()`.

        Rows are read without the lock: one that is changed meanwhile is marked afterwards.
        """
        live = self.table.live_ids().cpu()
        wanted = max(LEAST_TRAINING, 64 * num_lists(self.faiss))
        step = max(1, len(live) // wanted)
        training = self._vectors(live[::step].to(self.table.live.device))
        self.faiss.train(training)
        centroids = Lists.centroids_of(self.faiss)
        self._quantisers = quicken(self.faiss)
        if centroids is not None:
            self.lists = Lists(self.faiss, centroids, training)
        if self.in_place:
            self.faiss.set_direct_map_type(faiss_module().DirectMap.Array)
        for start in range(0, len(live), BUILD_CHUNK):
            ids = live[start : start + BUILD_CHUNK]
            if stopped():
                raise Abandoned
            vectors, lists = self._vectors(ids.to(self.table.live.device)), None
            if self.in_place and self.lists is not None:
                lists, self.chosen[ids.numpy()] = self.lists.nearest(vectors)
            self._add(ids.numpy(), vectors, lists)
        if self._quantisers:
            self._quantisers[-1].nprobe = ASSIGNMENT_PROBES
        self._settles = self.lists is not None and encodes_quickly(self.faiss)

    def mark(self, ids: Any) -> None:
        """Rows [n] (numpy, distinct) have changed: they are searched exactly until absorbed."""
        self.buffer.mark(ids[self._live(ids)])

    def forget(self, ids: Any) -> None:
        """Rows [n] (numpy, distinct) are no longer live."""
        self.buffer.drop(ids[self.buffer.holds(ids)])

    def settle(self) -> int:
        """Enter what was changed since the last call and belongs where its entry is: so many rows.

        That is as near to its list as is usual, or as when the list was chosen.
        """
        ids = self.buffer.take_recent()
        if not self._settles or self.lists is None:
            return 0
        known = Known(self.label_of, self.lists.places, self.chosen, self.lists.centroids)
        given = (self.metric, ids, known, self.lists.usual, FARTHER)
        ids, labels, lists, vectors = self.buffer.staying(*given)
        enter_in_place(self.faiss, labels, vectors, lists)
        self.buffer.drop(ids)
        return len(ids)

    def begin(self, count: int) -> Batch:
        """Rows to absorb: under the table's write lock."""
        ids = self.buffer.waiting_longest(count)
        labels = self.label_of[ids] - 1
        lists = np.full(len(ids), NOWHERE)
        if self.in_place and self.lists is not None:
            lists[labels >= 0] = self.lists.of(labels[labels >= 0])
        return Batch(ids, self.buffer.marks[ids], lists)

    def prepare(self, batch: Batch) -> Prepared:
        """Read the rows and find their lists: needs no lock.

        A row that is torn because it is just being written will have been marked by then.
        """
        vectors = self._vectors(from_numpy(batch.ids, self.table.live))
        if self.lists is None or not len(vectors):
            return Prepared(batch, vectors, None, np.zeros(len(vectors), np.bool_), None)
        lists, squares = batch.lists.copy(), self.lists.squares(vectors, batch.lists)
        moved = (lists == NOWHERE) | (squares > self.lists.usual)  # the others stay in their lists
        chosen = self.chosen[batch.ids]
        if moved.any():
            lists[moved], squares[moved] = self.lists.nearest(vectors[moved])
            chosen[moved] = squares[moved]
        return Prepared(batch, vectors, lists, squares > self.lists.reach, chosen)

    def finish(self, prepared: Prepared) -> None:
        """Enter what was not changed meanwhile and does not stray: under the write lock."""
        (ids, marks, _), vectors, lists, far, chosen = prepared
        same = (marks == self.buffer.marks[ids]) & self.buffer.holds(ids)
        near = same
        if self.buffer.count <= MOST_STRAYS * self.table.num_live:
            near = same & ~far
            self.buffer.rest(ids[same & far])
        ids, vectors, lists = ids[near], vectors[near], None if lists is None else lists[near]
        if chosen is not None:
            self.chosen[ids] = chosen[near]
        labels = self.label_of[ids] - 1
        known = labels >= 0 if self.in_place else np.zeros(len(ids), np.bool_)
        if known.any():
            at = None if lists is None else lists[known]
            enter_in_place(self.faiss, labels[known], vectors[known], at)
        if not known.all():
            at = lists[~known] if self.in_place and lists is not None else None
            self._add(ids[~known], vectors[~known], at)
        self.absorbed += len(ids)
        self.buffer.drop(ids)

    def found(
        self, queries: Float[Tensor, "Q W"], k: int, setting: Setting | None = None
    ) -> tuple[Found, Bool[Tensor, " Q"]]:
        """The k best of what is proposed and of the buffer, scored from the rows.

        And which queries' results may lack something better.
        """
        found, short = self._proposed(queries, k, setting or self.setting)
        if self.buffer.count:
            beside = self._beside(queries, found)
            scores, ids = (torch.cat(pair, 1) for pair in zip(found, beside, strict=True))
            found = best_of(scores, ids, k, self.metric)
        # Lists that were not probed may hold what is still missing.
        return found, short | (found.ids[:, min(k, self.table.num_live) - 1] < 0)

    def _proposed(
        self, queries: Float[Tensor, "Q W"], k: int, setting: Setting
    ) -> tuple[Found, Bool[Tensor, " Q"]]:
        """The k best valid entries that are proposed; and for which queries that may not be all.

        Those are queries near which so many entries are stale that k valid ones did not turn up.
        """
        vectors = to_faiss(queries, self.metric)
        wanted = min((k + SPARE) * setting.oversample, self.entries)
        most = min(self.entries, MOST_CANDIDATES)
        found, short = self._looked(queries, vectors, wanted, k, setting.effort)
        while wanted < most and short.any():
            wanted = min(wanted * DEEPER, most)
            places = short.nonzero().squeeze(1)
            some = (queries[places], vectors[places.cpu().numpy()])
            deeper, short[places] = self._looked(*some, wanted, k, setting.effort)
            found.scores[places], found.ids[places] = deeper
        return found, short

    def _looked(
        self, queries: Tensor, vectors: Any, wanted: int, k: int, effort: int
    ) -> tuple[Found, Tensor]:
        """As `_proposed`, of `wanted` entries that FAISS proposes."""
        labels = self.faiss.search(vectors, wanted, params=self._parameters(effort))[1]
        ids, short = self._rows_of(labels, k)
        return self.scoring.top(queries, from_numpy(ids, queries), k), from_numpy(short, queries)

    def _rows_of(self, labels: Any, k: int) -> tuple[Any, Any]:
        """Rows of the labels [Q, C] that are valid entries, else -1.

        And which queries have fewer than k, though the index had more labels.
        """
        if (loops := loops_for(self.table.live)) is not None:
            ids, live = np.empty_like(labels), self.table.live.numpy()
            known = (self.row_of, self.label_of, self.buffer.place, live)
            return ids, loops.valid(k, labels, *known, ids)
        ids = self.row_of[labels]  # label -1 takes the last: it is not valid below
        valid = (self.label_of[ids] == labels + 1) & (labels >= 0) & ~self.buffer.holds(ids)
        valid &= self._live(ids.ravel()).reshape(ids.shape)
        return np.where(valid, ids, -1), (valid.sum(1) < k) & ~(labels < 0).any(1)

    def _beside(self, queries: Tensor, found: Found) -> Found:
        """Rows of the buffer, and all of them that are among the k best of these and the found."""
        k = found.ids.shape[1]
        if self.buffer.count <= FEW:
            floor = found.scores[:, -1] * self.metric.sign  # of no row: the worst
            better = self.buffer.above(self.metric, queries, floor, k)
            if better is not None:
                return Found(self.scoring.own(queries, better), better)
        return self.buffer.scan(self.metric, queries, k)

    def _parameters(self, effort: int) -> Any:
        """FAISS's of a search: to make them takes 0.15 ms."""
        if effort not in self._made:
            self._made[effort] = search_parameters(self.faiss, effort)
        return self._made[effort]

    def imbalance(self) -> float:
        """How uneven the lists are: 1 is even; n: a search takes about n times as long."""
        lists = faiss_module().try_extract_index_ivf(self.faiss)
        return 1.0 if lists is None else float(lists.invlists.imbalance_factor())

    def stale(self) -> int:
        """Entries that are not valid, at least: rows gone or entered again under a new label."""
        return max(0, self.entries - self.table.num_live) + self.buffer.count

    def num_bytes(self) -> int:
        """Memory of the entries and of what is known of them, about."""
        try:
            code = self.faiss.sa_code_size()
        except RuntimeError:
            code = 4 * self.table.width
        known = self.entries * (int(code) + 8 + 8) + self.table.extent * 12
        return known + self.buffer.num_bytes()

    def _live(self, ids: Any) -> Any:
        return self.table.is_live(from_numpy(ids, self.table.live)).cpu().numpy()

    def _vectors(self, ids: Tensor) -> Any:
        return to_faiss(self.table.take(ids), self.metric)

    def _add(self, ids: Any, vectors: Any, lists: Any = None) -> None:
        first = self.entries
        if first + len(ids) > len(self.row_of):
            grown = np.zeros(max(first + len(ids), 2 * first), np.int64)
            grown[:first] = self.row_of[:first]
            self.row_of = grown
        self.row_of[first : first + len(ids)] = ids
        if lists is None:
            self.faiss.add(vectors)
        else:
            add_to_lists(self.faiss, vectors, lists)
        # Only now, so that an interrupted call leaves entries that are not valid.
        self.label_of[ids] = np.arange(first + 1, first + len(ids) + 1)
