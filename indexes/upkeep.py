"""When a fresh index absorbs, measures, tunes and trains anew, and how, beside the searches."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsemem.indexes.base import Found
from sparsemem.indexes.derivation import Abandoned, Derivation, Setting
from sparsemem.indexes.recall import Sampled, Watch, harder, recall, sampled_rows, tune
from sparsemem.indexes.worker import Rest, Worker, stand_back, tell

if TYPE_CHECKING:
    from sparsemem.indexes.fresh import FreshIndex

ABSORBED_AT_ONCE = 512  # rows
LENIENT = 8  # times the buffer may be full before writers lend the background a hand
MEASURED_AT_ONCE = 8  # queries for which writers may have to wait
CHECK_QUERIES = 8_192  # after so many, and
CHECK_ROWS = 4_096  # after so many changed rows, or a hundredth of all, recall is measured
# The watch looks at queries so often; while rows drift, when so many, or such a share of all rows,
# were changed and so many queries searched.
WATCH_EVERY, WATCH_QUERIES = 2_048, 64
WATCH_ROWS, WATCH_SHARE = 512, 1 / 250
WATCHED_AT_ONCE = 4  # of these
TOLD_AT_ONCE = 8  # of those of which it was told what counts: a part of their results
HARDER = 8  # times the effort that the watch compares with
# So many times as long as a check took it rests in the background; where only queries call for it.
RESTING, CALM = 2, 9
# Before what failed is tried again: seconds in the background; else, so that the same calls do
# the same every time, rows changed and queries searched.
PATIENCE, PATIENT_CALLS = 60.0, 4_096
BUILDER_NICE = 10

# The recall to tune for and the one at which to tune again, between the floor (0) and 1.
TARGET, ALARM = 0.5, 0.3
EASY = 0.9  # more than is needed: look less hard
CAUTIOUS = 0.9  # while there are no live queries: rows are easier to serve

# What calls for lists trained anew.
UNEVEN = 2.0  # imbalance over that of new lists
REPLACED = 0.5  # rows absorbed, as a share of those built from
GROWN = 2.0  # live rows over those built from
STALE = 0.3  # share of the entries
STRAINED = 6  # times the effort of new lists
STRAYED = 1 / 16  # share of the rows far from all lists


class Upkeep:
    """Looks after one `FreshIndex`, in the background or within the calls that make it due."""

    def __init__(self, index: FreshIndex, background: bool) -> None:
        self.index = index
        self.recall: float | None = None
        self.rebuilds = 0
        self._errors: dict[str, Exception] = {}  # by what failed when it was last done
        self._built_rows, self._built_imbalance, self._built_at = 0, 1.0, time.monotonic()
        self._imbalance, self._built_effort = 1.0, 1  # the imbalance as last measured
        self._changed = self._changes = 0  # rows changed, so far; since the last check, not settled
        self._checked_queries = 0
        self._tuned_k = 0  # the greatest k that it was tuned for
        self._settled_live = True  # False: tuned on rows, before there were queries
        self._watch, self._watches, self._watched_at = Watch(), 0, 0
        self._unwatched = 0  # queries since
        self._rest = Rest()  # of checks
        self._failed_at, self._failed_after = -PATIENCE, -PATIENT_CALLS
        self._building = threading.Lock()
        self._builder: threading.Thread | None = None
        self._worker = Worker(self) if background else None

    @property
    def exact_only(self) -> bool:
        """Whether searches are scans: there is no index yet, or it cannot hold the floor."""
        current = self.index.current
        return current is None or not self.index.serves(current)

    def changed(self, count: int) -> None:
        """Rows were changed or removed, under the table's write lock."""
        self._changes += count
        self._changed += count
        index, current = self.index, self.index.current
        many = self._absorb_due() or (index.takes_repeats and self._changed_much())
        if current is not None and many:
            self._guarded("settle", lambda: self._settle_rows(current))
        # Whoever changes rows faster than they are absorbed in the background lends a hand.
        limit = index.buffer_rows * (1 if self._worker is None else LENIENT)
        if current is not None and current.buffer.waiting > limit:
            self._guarded("absorb", lambda: self._lend_a_hand(current, count, limit))
        if self._worker is None:
            self._guarded("check", self._check_if_due)
            if self._rebuild_due():
                self._guarded("rebuild", self._build)
        elif self._absorb_due() or self._check_now() or self._build_now():
            self._worker.wake()

    def searched(self, derived: Derivation, queries: Tensor, found: Found) -> None:
        """A search has ended, under the table's read lock."""
        if not self.index.sample.is_told and self._watch_due(derived, len(queries)):
            step = max(1, len(queries) // WATCHED_AT_ONCE)
            some = slice(self._watches % step, None, step)
            known = Found(found.scores[some], found.ids[some])
            self._watch_agreement(derived, queries[some], known)
        if not self._check_now():
            return
        if self._worker is None:
            self._guarded("check", self._check_if_due)
        else:
            self._worker.wake()

    def told(
        self, derived: Derivation, queries: Tensor, k: int, counts: Tensor, first: bool
    ) -> None:
        """What counted of the results of some queries: see `FreshIndex.tell`.

        first: it is known only now that not all of them do: the search may look less hard.
        """
        self._settled_live = self._settled_live and not first
        if self._watch_due(derived, len(queries)):
            some, counts = queries[:TOLD_AT_ONCE], counts[:TOLD_AT_ONCE]
            self._watch_agreement(derived, some, self.index.found(derived, some, k), counts)

    def maintain(self) -> None:
        """Do what is due: called by the background thread."""
        self._guarded("absorb", self._absorb)
        if self._absorb_due() and self._worker is not None:
            self._worker.wake()  # more has come meanwhile; but first what else is due
        if self._build_now():
            assert self._worker is not None
            self._builder = self._worker.start(self._build_aside)
        if self._check_now():
            with self._rest.after():
                self._guarded("check", self._check_if_due)

    def rebuild(self) -> None:
        """Build anew now, in the calling thread."""
        if self._worker is not None:
            if self.index.table.lock.is_writing():
                raise RuntimeError(
                    "rebuild() under table.lock.write() could wait for a build that waits for this"
                    " thread: call it without the lock. Rows that were changed in place are told"
                    " by changed(ids)"
                )
            self._build()
        else:
            with self.index.table.lock.write():
                self._build()

    def close(self) -> None:
        """Return when nothing runs in the background any more."""
        if self._worker is not None:
            self._worker.stop()

    def stats(self) -> dict[str, Any]:
        """The figures of `FreshIndex.stats` that are kept here."""
        return {
            "recall": self.recall,
            "age": time.monotonic() - self._built_at,
            "rebuilds": self.rebuilds,
            "exact": self.exact_only or self.index.table.num_live < self.index.exact_below,
            "error": next((repr(error) for error in list(self._errors.values())), None),
        }

    # Absorbing

    def _absorb_due(self) -> bool:
        current = self.index.current
        return current is not None and current.buffer.waiting > self.index.buffer_rows

    def _settle_rows(self, current: Derivation) -> None:
        """What calls for nothing calls for no check, and for no closer watch."""
        settled = current.settle()
        self._changes = max(0, self._changes - settled)
        current.buffer.marked -= settled
        self._watched_at = min(self._watched_at, current.buffer.marked)

    def _lend_a_hand(self, current: Derivation, count: int, limit: int) -> None:
        current.tidy()
        if current.buffer.waiting > limit:
            current.absorb(max(2 * count, ABSORBED_AT_ONCE * current.stride))

    def _absorb(self) -> None:
        if (current := self.index.current) is None or not self._absorb_due():
            return
        with self.index.table.lock.write():
            current.tidy()
        if self._absorb_due():
            self._shorten(current)

    def _shorten(self, derived: Derivation) -> None:
        """Absorb as many rows as wait now; the lock is taken for moments only."""
        lock, many = self.index.table.lock, ABSORBED_AT_ONCE * derived.stride
        for _ in range(0, derived.buffer.waiting, many):
            with lock.write():
                batch = derived.begin(many)
            prepared = derived.prepare(batch)
            with lock.write():
                derived.finish(prepared)

    # Measuring and tuning

    def _watch_due(self, derived: Derivation, count: int) -> bool:
        """Whether, after so many queries more, it is time: more often while rows drift."""
        self._unwatched += count
        rows = max(WATCH_ROWS, int(WATCH_SHARE * self.index.table.num_live))
        drifting = derived.buffer.marked - self._watched_at >= rows
        every = WATCH_QUERIES * derived.stride if drifting else WATCH_EVERY
        if self.index.min_recall is None or self._unwatched < every:
            return False
        self._unwatched, self._watched_at = 0, derived.buffer.marked
        self._watches += 1
        return derived.setting.effort < derived.knob.limit

    def _watch_agreement(
        self, derived: Derivation, queries: Tensor, known: Found, counts: Tensor | None = None
    ) -> None:
        """Have the index search some queries harder, and look harder from now on if that helps."""
        setting, limit = derived.setting, derived.knob.limit
        much = setting._replace(effort=min(HARDER * setting.effort, limit))
        truth = self.index.deeper(derived, queries, known, much)
        agreement = recall(known, truth, self.index.metric, counts)
        mean = self._watch.add(agreement, self._floor(ALARM))
        if mean is not None:
            derived.setting = harder(setting, limit, 1 if mean >= self._floor(0.0) else 2)

    def _check_due(self) -> bool:
        if self.exact_only:
            return False
        queries = self.index.sample.seen - self._checked_queries
        enough = queries > 0 and self.index.sample.is_enough
        called_for = enough if self._is_new() else queries >= CHECK_QUERIES
        return self._changed_much() or called_for

    def _changed_much(self) -> bool:
        return self._changes >= max(CHECK_ROWS, self.index.table.num_live // 100)

    def _is_new(self) -> bool:  # not tuned yet for queries such as there are now
        return not self._settled_live or self.index.sample.k > self._tuned_k

    def _check_now(self) -> bool:
        is_calm = not self._changed_much() and not self._is_new()
        rested = self._worker is None or self._rest.is_over(CALM if is_calm else RESTING)
        return rested and self._check_due()

    def _check_if_due(self) -> None:
        """Measure the recall on live queries; look harder where it comes near the floor."""
        index, derived, sample = self.index, self.index.current, self.index.sample.queries()
        if derived is None or not self._check_due():
            return
        self._changes, self._checked_queries, alarms = 0, index.sample.seen, self._watch.alarms
        derived.noted()
        self._imbalance = derived.imbalance()
        if not len(sample.queries):
            return
        new, self._tuned_k = self._is_new(), index.sample.k
        truth, setting = self._truth(sample), derived.setting
        reached = self._measured(derived, setting, sample, truth)
        if index.min_recall is not None:
            eased = reached > self._floor(EASY) and setting.effort > 1
            if reached < self._floor(ALARM) or eased or new:
                setting, reached = self._tuned(derived, sample, truth, TARGET)
        with index.table.lock.read():  # a swap may have come between: then it is about nothing
            if index.current is not derived:
                return
            if self._watch.alarms > alarms:  # of later queries than those that were measured
                setting = max(setting, derived.setting)
            self._settle(derived, setting, reached)
            if not self._settled_live:
                self._settled_live, self._built_effort = True, setting.effort

    def _floor(self, part: float) -> float:
        assert self.index.min_recall is not None
        return self.index.min_recall + part * (1 - self.index.min_recall)

    def _tuned(
        self, derived: Derivation, sample: Sampled, truth: Found, target: float
    ) -> tuple[Setting, float]:
        return tune(
            lambda setting: self._measured(derived, setting, sample, truth),
            derived.start,
            derived.knob.limit,
            self._floor(target),
        )

    def _settle(self, derived: Derivation, setting: Setting, reached: float) -> None:
        """Search so hard from now on, or exactly if that is not enough."""
        derived.setting, self.recall = setting, reached
        held = self.index.min_recall is None or reached >= self._floor(0.0)
        if derived.holds and not held:
            tell(
                f"index {self.index.name!r} reaches a recall of {reached:.3f} at most on live"
                f" queries, min_recall is {self.index.min_recall}: searching exactly from now on"
            )
        derived.holds = held

    def _truth(self, sample: Sampled) -> Found:
        # Without the lock, which a scan would hold for long: a row that changes meanwhile is
        # one among many.
        return self.index.exact._search(sample.queries, self.index.sample.k)

    def _measured(
        self, derived: Derivation, setting: Setting, sample: Sampled, truth: Found
    ) -> float:
        parts = []
        many = MEASURED_AT_ONCE * derived.stride
        for some in torch.split(sample.queries, many):
            with self.index.table.lock.read():
                parts.append(self.index.found(derived, some, self.index.sample.k, setting))
        found = Found(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return recall(found, truth, self.index.metric, sample.counts)

    # Building

    def _rebuild_due(self) -> bool:
        current, live = self.index.current, self.index.table.num_live
        if live < self.index.exact_below or self._waits_after_failure():
            return False
        if current is None or live > GROWN * self._built_rows:
            return True
        worn = current.absorbed > REPLACED * self._built_rows or current.stale() > STALE * live
        hard = current.setting.effort > STRAINED * self._built_effort
        hard |= current.overrun or current.buffer.strays > STRAYED * live
        return worn or hard or self._imbalance > UNEVEN * self._built_imbalance

    def _build_now(self) -> bool:
        busy = self._builder is not None and self._builder.is_alive()
        return not busy and self._rebuild_due()

    def _build_aside(self) -> None:
        stand_back(BUILDER_NICE)
        assert self._worker is not None
        worker = self._worker
        with contextlib.suppress(Abandoned):
            self._guarded("rebuild", lambda: self._build(lambda: worker.stopped))

    def _build(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Build beside what is searched, then swap: readers see one or the other, whole."""
        index = self.index
        with self._building:
            derived = index.derive()
            with index.table.lock.write():
                index.next = derived if index.table.num_live else None  # told of changes now
                built_rows = index.table.num_live
            try:
                if built_rows:
                    derived.build(stopped)
                    self._shorten(derived)
                    self._choose(derived)
                    self._shorten(derived)
                with index.table.lock.write():
                    derived.noted()
                    index.current, self._built_rows = index.next, built_rows
            finally:
                index.next = None
            self._rest.cut_short()  # new lists have to show soon what they are worth
            self._built_at, self._built_imbalance = time.monotonic(), derived.imbalance()
            self._imbalance, self._built_effort = self._built_imbalance, derived.setting.effort
            self.rebuilds += 1

    def _choose(self, derived: Derivation) -> None:
        """How hard to look, found on live queries, or on rows while there are none."""
        index = self.index
        if index.min_recall is None:
            return
        sample, target = index.sample.queries(), TARGET
        self._settled_live = len(sample.queries) > 0
        if not self._settled_live:
            sample, target = sampled_rows(index.table), CAUTIOUS
        self._tuned_k = index.sample.k
        self._settle(derived, *self._tuned(derived, sample, self._truth(sample), target))

    def _waits_after_failure(self) -> bool:
        if self._worker is not None:
            return time.monotonic() < self._failed_at + PATIENCE
        return self._work() < self._failed_after + PATIENT_CALLS

    def _work(self) -> int:
        """Rows changed and queries searched so far."""
        return self._changed + self.index.sample.seen

    def _guarded(self, name: str, action: Callable[[], object]) -> None:
        """Upkeep that fails leaves the index as it was, and true: it is tried again later."""
        try:
            action()
        except Abandoned:
            raise
        except Exception as error:
            first = name not in self._errors
            self._errors[name] = error
            self._failed_at, self._failed_after = time.monotonic(), self._work()
            if first:
                tell(f"upkeep of index {self.index.name!r}: {error!r}")
        else:
            self._errors.pop(name, None)
