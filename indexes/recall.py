"""Recall on live queries: a sample of them, its measure against exact search, and the tuning."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.indexes.base import MISSING, Found
from sparsemem.indexes.derivation import Setting, ladder
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

SAMPLE = 128  # queries: a recall of 0.95 at 8 is known to about 0.01
ENOUGH = SAMPLE // 2  # queries to tune by
USUAL_K = 8  # what is tuned for before there are queries
OF_A_BATCH = 4  # queries that are kept of each
MOST_OVERSAMPLING = 64
WATCHED = 6  # times that some queries' agreement is averaged
PLATEAU = 0.002  # a rise of recall that is not worth looking harder


class Sampled(NamedTuple):
    """Queries of a sample, and the worst score of each that counts (None: all that it found)."""

    queries: Float[Tensor, "n W"]
    counts: Float[Tensor, " n"] | None


def sampled_rows(table: RowTable) -> Sampled:
    """Live rows in the place of queries, while there are none."""
    live = table.live_ids()
    return Sampled(table.take(live[:: max(1, len(live) // SAMPLE)][:SAMPLE]), None)


class QuerySample:
    """The latest queries, some of each batch, and the k that they asked for.

    Once it is told which results of a query counted, it keeps only queries of which it is told.
    """

    def __init__(self, like: Tensor, width: int, dtype: torch.dtype) -> None:
        self._rows = torch.zeros(SAMPLE, width, dtype=dtype, device=like.device)
        self._counts = torch.zeros(SAMPLE, dtype=dtype, device=like.device)
        self._asked = [0] * SAMPLE  # the k of each
        self._lock = threading.Lock()  # readers search side by side
        self.seen = 0  # queries, all of them
        self.is_told = False  # which results count
        self._batches = self._kept = 0

    def __len__(self) -> int:
        return min(self._kept, SAMPLE)

    @property
    def is_enough(self) -> bool:
        """Whether there are queries enough to tune by."""
        return len(self) >= ENOUGH

    @property
    def k(self) -> int:
        """The greatest k that one of the sample asked for."""
        return max(self._asked) or USUAL_K

    def add(self, queries: Tensor, k: int) -> None:
        """Keep a few of a batch of queries, and more as long as there is room."""
        with self._lock:
            self.seen += len(queries)
            if not self.is_told:
                self._keep(queries, k, None)

    def tell(self, queries: Tensor, k: int, counts: Tensor) -> None:
        """Keep a few, or more, of queries that were searched, with the worst scores that count."""
        with self._lock:
            if not self.is_told:
                self.is_told, self._kept, self._asked = True, 0, [0] * SAMPLE
            self._keep(queries, k, counts)

    def queries(self) -> Sampled:
        """A copy of the sample; empty while there is none."""
        with self._lock:
            counts = self._counts[: len(self)].clone() if self.is_told else None
            return Sampled(self._rows[: len(self)].clone(), counts)

    def _keep(self, queries: Tensor, k: int, counts: Tensor | None) -> None:
        many = max(OF_A_BATCH, SAMPLE - self._kept)
        # A wandering offset, so that no place in the batch is preferred.
        step = max(1, -(-len(queries) // many))
        some = slice(self._batches % step, None, step)
        self._enter(self._rows, queries[some])
        if counts is not None:
            self._enter(self._counts, counts[some])
        kept = self._kept + len(queries[some])
        for number in range(self._kept, kept):
            self._asked[number % SAMPLE] = k
        self._kept = kept
        self._batches += 1

    def _enter(self, column: Tensor, new: Tensor) -> None:
        place = self._kept % SAMPLE
        room = SAMPLE - place  # slices: a list of places would be copied to the device
        column[place : place + len(new)] = new[:room]
        column[: max(0, len(new) - room)] = new[room:]


def recall(
    found: Found, truth: Found, metric: Metric, counts: Float[Tensor, " n"] | None = None
) -> float:
    """Share of the true neighbours that were found, ties with the last one counting as true.

    counts: the worst score of each query that counts, beside the best one, which always does (so
    that there is something to measure where few count); None: all do.
    """
    there = truth.ids >= 0
    if counts is not None:
        there[:, 1:] &= metric.sign * truth.scores[:, 1:] >= metric.sign * counts.unsqueeze(1)
    if not there.any():
        return 1.0
    worst = truth.scores.masked_fill(~there, torch.inf * metric.sign)
    worst = worst.amin(1, keepdim=True) if metric.sign > 0 else worst.amax(1, keepdim=True)
    good = metric.sign * found.scores >= metric.sign * worst
    true = truth.ids.masked_fill(~there, MISSING)
    good |= among(found.ids, true)  # whose scores another kernel may have rounded otherwise
    good &= found.ids >= 0
    hits = torch.minimum(good.sum(1), there.sum(1))
    return int(hits.sum()) / int(there.sum())


def among(ids: Int[Tensor, "n k"], others: Int[Tensor, "n j"]) -> Bool[Tensor, "n k"]:
    """Which of the ids are among the others of their query."""
    others = others.sort(1).values
    places = torch.searchsorted(others, ids.contiguous()).clamp(max=others.shape[1] - 1)
    return others.gather(1, places) == ids


class Watch:
    """Notices within some hundred queries that a search no longer looks hard enough.

    A few live queries are searched again, harder; what both agree on counts as found. That costs
    next to nothing, where the truth would cost a scan of all rows.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # readers search side by side
        self._latest: deque[float] = deque(maxlen=WATCHED)
        self.alarms = 0

    def add(self, agreement: float, alarm: float) -> float | None:
        """Count some queries; the mean agreement if it is under the alarm, and then start again."""
        with self._lock:
            self._latest.append(agreement)
            mean = sum(self._latest) / len(self._latest)
            if len(self._latest) < WATCHED // 2 or mean >= alarm:
                return None
            self._latest.clear()
            self.alarms += 1
            return mean


def harder(setting: Setting, limit: int, steps: int) -> Setting:
    """A setting some steps up the ladder."""
    above = [effort for effort in ladder(limit) if effort > setting.effort]
    return setting._replace(effort=[setting.effort, *above[:steps]][-1])


def tune(
    measure: Callable[[Setting], float], start: Setting, limit: int, target: float
) -> tuple[Setting, float]:
    """The cheapest setting that reaches the target recall, or the best one; and its recall.

    Looks harder step by step; where that does not help any more, asks for more candidates.
    """
    oversample = start.oversample
    best = (start, -1.0)
    efforts = ladder(limit)
    while oversample <= MOST_OVERSAMPLING:
        before = -1.0
        for effort in efforts:
            setting = Setting(effort, oversample)
            reached = measure(setting)
            if reached > best[1]:
                best = (setting, reached)
            if reached >= target:
                return setting, reached
            if reached < before + PLATEAU and effort > efforts[len(efforts) // 2]:
                break
            before = reached
        efforts = [effort for effort in efforts if effort >= best[0].effort]
        oversample *= 2
    return best
