"""An index on the device of its rows, and what it does not know yet: `Derived`, in tensors.

FAISS GPU can add and nothing else. So an absorbed row always gets a new label, its old entry is
passed over from then on, and when too many are, the lists are built anew beside and swapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.indexes.base import MISSING, Found
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
from sparsemem.indexes.device_buffer import DeviceBuffer, buffer_bytes
from sparsemem.indexes.device_faiss import MOST, Engine
from sparsemem.indexes.device_ranking import (
    Known,
    Proposals,
    comparable_queries,
    rank,
    ranks,
)
from sparsemem.indexes.kinds import comparable, new_faiss_index
from sparsemem.indexes.lists import LEAST, MEASURED, QUARTILES, SPANS
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.scoring import Scoring
from sparsemem.indexes.table import RowTable

BUILD_CHUNK = 131_072  # rows added at once: a search beside has to wait for them
MEASURED_NUMBERS = 2**24  # distances taken at once


def entry_bytes(name: str, width: int, metric: Metric) -> int:
    """Memory of an entry of an index in FAISS, about: its code and its label."""
    return int(new_faiss_index(name, width, metric).sa_code_size()) + torch.int64.itemsize


def label_bytes(num_rows: int, entries: int) -> int:
    """Memory of the labels of an index that was built of so many rows and now has more entries."""
    room = max(1, min(num_rows, BUILD_CHUNK))  # for what is added first
    while room < entries:
        room *= 2
    return (num_rows + room) * torch.int64.itemsize


def derived_bytes(num_rows: int, row_bytes: int, entry: int, entries: int, most: int = 0) -> int:
    """Memory of a `DeviceDerived` of a table of so many rows, all live, without FAISS's temporary.

    entry: see `entry_bytes`. entries: those of all rows, and stale ones. most: see `buffer_bytes`.
    """
    labels, buffer = label_bytes(num_rows, entries), buffer_bytes(num_rows, row_bytes, most)
    return entries * entry + labels + buffer


Method = TypeVar("Method", bound=Callable[..., Any])


def in_order(method: Method) -> Method:
    """Have a method work on its device's default stream, and its caller's stream wait for it.

    Threads that search, write and build share the tensors. On one stream they see each other's
    work in the order in which they did it, which locks see to; a caller with a stream of its own
    is let in behind what it did before, and goes on behind what was done for it.
    """

    @functools.wraps(method)
    def ordered(self: Any, *arguments: Any) -> Any:
        with _default_stream(self.table.rows.device) as outside:
            result = method(self, *arguments)
        if outside is not None:
            for tensor in _tensors(result):
                tensor.record_stream(outside)
        return result

    return cast(Method, ordered)


@contextmanager
def _default_stream(device: torch.device) -> Iterator[Any]:
    """The default stream is the current one; gives the one that was, where that is another."""
    if device.type != "cuda":
        yield None
        return
    current, default = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if current == default:
        yield None
        return
    default.wait_stream(current)
    try:
        with torch.cuda.stream(default):
            yield current
    finally:
        current.wait_stream(default)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple):
        for part in result:
            yield from _tensors(part)


class DeviceBatch(NamedTuple):
    """Rows that waited longest, and the version of the buffer that says so."""

    ids: Tensor  # [n]
    version: int


class DevicePrepared(NamedTuple):
    """What is to be entered of a batch."""

    batch: DeviceBatch
    vectors: Tensor  # [n, W]
    far: Tensor  # bool [n]: strays


class Reach:
    """How far from the nearest list a row may be: see `lists.Lists`."""

    def __init__(self, centroids: Float[Tensor, "L W"], training: Float[Tensor, "n W"]) -> None:
        self._centroids = centroids
        some = training[:: max(1, len(training) // MEASURED)]
        quartiles = torch.tensor(QUARTILES, device=some.device)
        middle, upper = torch.quantile(self.squares(some), quartiles)
        self._reach = torch.maximum(upper + SPANS * (upper - middle), LEAST * upper)

    def far(self, vectors: Float[Tensor, "n W"]) -> Bool[Tensor, " n"]:
        """Which of the vectors stray."""
        return self.squares(vectors) > self._reach

    def squares(self, vectors: Float[Tensor, "n W"]) -> Float[Tensor, " n"]:
        """Squared distances from the nearest centroids."""
        parts = torch.split(vectors, max(1, MEASURED_NUMBERS // len(self._centroids)))
        exactly = "donot_use_mm_for_euclid_dist"
        distances = [torch.cdist(part, self._centroids, compute_mode=exactly) for part in parts]
        return torch.cat([part.amin(1) for part in distances]).square()


class DeviceDerived(Derivation):
    """An index whose entries are proposals of rows, all of it on the rows' device.

    Labels, validity, buffer and strays are as in `Derived`. A change waits
    for nothing unless the log of changes is full; absorbing and building do, now and then.
    """

    stride = 16
    buffer: DeviceBuffer

    def __init__(self, table: RowTable, metric: Metric, name: str, kind: type[Engine]) -> None:
        self.table, self.metric, self.scoring = table, metric, Scoring(table.take, metric)
        device = table.rows.device
        self.engine = kind(name, table.width, metric, device)
        self.knob = self.engine.knob
        oversample = QUANTISED if self.engine.quantised else 1
        self.start = Setting(min(START_EFFORT, self.knob.limit), oversample)
        self.setting = self.start
        self.holds = True
        self.absorbed = self.lost = 0  # lost: strays that were entered, where there were too many
        self.buffer = DeviceBuffer(table)
        # By row: one more than its latest label; 0: it has none. By label: its row.
        self.label_of = torch.zeros(table.num_rows, dtype=torch.int64, device=device)
        self.row_of = torch.zeros(0, dtype=torch.int64, device=device)
        self.reach: Reach | None = None

    @property
    def entries(self) -> int:
        """Entries, valid or not."""
        return self.engine.next_label

    @in_order
    def build(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Train on a sample of the live rows, and add them all; Abandoned once `stopped()`.

        Rows are read without the lock: one that is changed meanwhile is marked afterwards.
        """
        live = self.table.live_ids()
        wanted = max(LEAST_TRAINING, 64 * self.engine.num_lists)
        training = self._vectors(live[:: max(1, len(live) // wanted)])
        centroids = self.engine.train(training)
        if centroids is not None:
            self.reach = Reach(centroids, training)
        for ids in torch.split(live, BUILD_CHUNK):
            if stopped():
                raise Abandoned
            self._add(ids, self._vectors(ids))

    @in_order
    def mark(self, ids: Int[Tensor, " n"]) -> None:
        """Rows have changed: they are searched exactly until absorbed."""
        self.buffer.mark(ids)

    @in_order
    def forget(self, ids: Int[Tensor, " n"]) -> None:
        """Rows are no longer live."""
        self.buffer.drop(ids)

    @in_order
    def tidy(self) -> None:
        """Count what waits: under the table's write lock."""
        self.buffer.tidy()

    @in_order
    def settle(self) -> int:
        """Tidy the buffer, where most of it may be told again by now; how much was, so far.

        To count the rows that are told would make the host wait each time.
        """
        if self.buffer.count > 2 * self.buffer.settled:
            self.buffer.tidy()
        return self.buffer.take_replaced()

    def noted(self) -> None:
        """What was told until now is not `settle`'s to count."""
        self.buffer.forget_replaced()

    @in_order
    def buffered(self) -> tuple[int, int]:
        """Rows in the buffer, exactly, and how many of them are strays. Waits for the device."""
        return self.buffer.counts()

    @in_order
    def begin(self, count: int) -> DeviceBatch:
        """Rows to absorb: under the table's write lock."""
        self.buffer.tidy()
        return DeviceBatch(self.buffer.longest(count), self.buffer.version)

    @in_order
    def prepare(self, batch: DeviceBatch) -> DevicePrepared:
        """Read the rows and see which of them stray: needs no lock."""
        vectors = self._vectors(batch.ids)
        far = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        if self.reach is not None and len(vectors):
            far = self.reach.far(vectors)
        return DevicePrepared(batch, vectors, far)

    @in_order
    def finish(self, prepared: DevicePrepared) -> None:
        """Enter what was not changed meanwhile and does not stray: under the write lock."""
        (ids, version), vectors, far = prepared
        if version != self.buffer.version:  # another thread has absorbed meanwhile
            return
        near = same = self.buffer.unchanged(ids)
        if self.buffer.count <= MOST_STRAYS * self.table.num_live:
            near = same & ~far
        elif not self.overrun:
            self.lost += int((same & far).sum())
            self.overrun = self.buffer.strays + self.lost > MOST_STRAYS * self.table.num_live
        entered = ids[near]
        self._add(entered, vectors[near])
        self.absorbed += len(entered)
        self.buffer.drop(entered)
        self.buffer.rest(ids[same & ~near])

    @in_order
    def found(
        self, queries: Float[Tensor, "Q W"], k: int, setting: Setting | None = None
    ) -> tuple[Found, Bool[Tensor, " Q"]]:
        """The best of what is proposed and of the buffer, scored from the rows.

        And which queries' results may lack something better. Nothing waits for the device.
        """
        setting = setting or self.setting
        if not ranks(self.table, k):
            vectors = comparable(queries, self.metric)
            return self._ranked(queries, k, self.proposals(vectors, k, setting))
        with torch.cuda.device_of(self.table.rows):  # type: ignore[no-untyped-call]
            proposals = self.proposals(comparable_queries(queries, self.metric), k, setting)
            beside = self.buffer.nearest(self.metric, queries, k)
            known = Known(self.row_of, self.label_of, self.buffer.place, self.buffer.ids)
            return rank(self.table, self.metric, queries, proposals, beside, known, k)

    def proposals(self, vectors: Float[Tensor, "Q W"], k: int, setting: Setting) -> Proposals:
        """Labels of entries, some of which may be stale, for comparable queries."""
        live = self.table.num_live
        wanted = (k + SPARE) * setting.oversample * max(self.entries, live) // max(live, 1)
        wanted = min(wanted, self.entries, MOST)
        found = self.engine.search(vectors, wanted, setting.effort)
        return Proposals(*found, wanted == self.entries)

    def candidates(
        self, k: int, proposals: Proposals
    ) -> tuple[Int[Tensor, "Q C"], Float[Tensor, " Q"]]:
        """Ids of valid entries, -1 elsewhere; and a bound of what better ones may be worth.

        The bound is that of the worst proposal where so many were stale that k valid ones did not
        turn up among them, or else there is none.
        """
        scores, labels, are_all = proposals
        ids = self.row_of[labels.clamp(min=0)]
        valid = (self.label_of[ids] == labels + 1) & (labels >= 0) & ~self.buffer.holds(ids)
        valid &= self.table.live[ids]
        bound = scores[:, -1].to(self.table.dtype) * self.metric.sign
        hidden = (valid.sum(1) < min(k, self.table.num_live)) & (labels[:, -1] >= 0)
        if are_all:
            hidden = torch.zeros_like(hidden)
        return ids.masked_fill(~valid, MISSING), bound.masked_fill(~hidden, -torch.inf)

    def _ranked(
        self, queries: Float[Tensor, "Q W"], k: int, proposals: Proposals
    ) -> tuple[Found, Bool[Tensor, " Q"]]:
        """As `rank`, in torch's operations."""
        proposed, hidden = self.candidates(k, proposals)
        beside, beyond = self.buffer.best(self.metric, queries, k)
        ids = torch.cat([proposed, beside], 1)
        found = self.scoring.top(queries, ids, k)
        last = min(k, self.table.num_live) - 1
        worth = found.scores[:, last] * self.metric.sign
        unsure = (found.ids[:, last] < 0) | (hidden > worth)
        return found, unsure | ((beyond >= worth) & (beyond > -torch.inf))

    def imbalance(self) -> float:
        """How uneven the lists are: 1 is even; n: a search takes about n times as long."""
        return self.engine.imbalance()

    def stale(self) -> int:
        """Entries that are not valid, at least: rows gone or entered again under a new label."""
        return max(0, self.entries - self.table.num_live) + self.buffer.settled

    def num_bytes(self) -> int:
        """Memory of the entries and of what is known of them, about."""
        known = int(self.label_of.nbytes + self.row_of.nbytes)
        return self.engine.num_bytes() + known + self.buffer.num_bytes()

    def _vectors(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n W"]:
        return comparable(self.table.take(ids), self.metric)

    def _add(self, ids: Int[Tensor, " n"], vectors: Float[Tensor, "n W"]) -> None:
        first = self.entries
        end = first + len(ids)
        if end > len(self.row_of):
            grown = self.row_of.new_zeros(max(end, 2 * first))
            grown[:first] = self.row_of[:first]
            self.row_of = grown
        self.row_of[first:end] = ids
        self.engine.add(vectors)
        # Only now, so that an interrupted call leaves entries that are not valid.
        self.label_of.index_copy_(0, ids, torch.arange(first + 1, end + 1, device=ids.device))
