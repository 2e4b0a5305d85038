"""Any FAISS index, kept true while rows change: changed rows are searched exactly beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.checks import check_fraction, check_size
from sparsemem.indexes.base import MISSING, Found, Index, best_of
from sparsemem.indexes.derivation import Derivation, Setting
from sparsemem.indexes.derived import Derived
from sparsemem.indexes.device_derived import DeviceDerived
from sparsemem.indexes.device_faiss import engine_for
from sparsemem.indexes.exact import ExactIndex
from sparsemem.indexes.kinds import new_faiss_index, num_lists
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.recall import QuerySample
from sparsemem.indexes.scoring import TableScoring
from sparsemem.indexes.table import RowTable
from sparsemem.indexes.upkeep import Upkeep

# Changed rows that are scanned, by one product, and live rows below which a scan is as fast: on
# the host and on a GPU.
BUFFER_ROWS, DEVICE_BUFFER_ROWS = 256, 16_384
EXACT_BELOW, DEVICE_EXACT_BELOW = 16_384, 131_072


class FreshIndex(Index):
    """A FAISS index named by its factory string, over a table that keeps changing.

    Where the rows are on a GPU and FAISS has the index there (`device_faiss`), all of it stays
    there; else FAISS works on the host.

    Changed rows are found exactly from the moment of the change, and what was there before
    never is. Upkeep goes on beside the searches, in a background thread: the buffer of changed
    rows is absorbed; recall is measured on a sample of live queries against exact search, and
    the search looks harder where it comes near `min_recall`; after drift the lists are trained
    anew, beside the old ones, and swapped in. An index that cannot hold `min_recall` gives way
    to exact search, with a warning, until it is next built. So does, without one, an index on a
    GPU that rows have left so fast that many more stray than it can keep beside its lists.

    Args:
        table, metric: as for every index.
        name: FAISS factory string.
        min_recall: floor of the recall that it is tuned for; None: measured, but never tuned.
            Between a drift and the tuning or training that answers it recall can be lower.
        background: False: upkeep runs within the calls that make it due, which is
            deterministic.
        buffer_rows: changed rows beyond which they are absorbed. Default: 256; on a GPU 16,384.
        exact_below: live rows below which every search is a scan. Default: 16,384, on a GPU
            131,072, or 4 a list.
    """

    def __init__(
        self,
        table: RowTable,
        metric: Metric,
        name: str,
        *,
        min_recall: float | None = 0.95,
        background: bool = True,
        buffer_rows: int | None = None,
        exact_below: int | None = None,
    ) -> None:
        super().__init__(table, metric)
        lists = num_lists(new_faiss_index(name, table.width, metric))  # refuses a wrong name now
        self.name = name
        self.min_recall = None if min_recall is None else check_fraction("min_recall", min_recall)
        self.engine = engine_for(name, table.rows.device)  # None: on the host
        self.takes_repeats = self.engine is not None  # to leave them out is to wait for it
        if buffer_rows is None:
            buffer_rows = BUFFER_ROWS if self.engine is None else DEVICE_BUFFER_ROWS
        self.buffer_rows = check_size("buffer_rows", buffer_rows)
        if exact_below is None:
            few = EXACT_BELOW if self.engine is None else DEVICE_EXACT_BELOW
            exact_below = max(few, 4 * lists)
        self.exact_below = check_size("exact_below", exact_below)
        self.current: Derivation | None = None  # what is searched; None: still a scan
        self.next: Derivation | None = None  # while it is being built
        self.scoring = TableScoring(table, metric)
        self.exact = ExactIndex(table, metric)
        self.exact.scoring = self.scoring  # or a row would score otherwise in a scan
        self.sample = QuerySample(table.rows, table.width, table.dtype)
        self.scans = 0
        self.upkeep = Upkeep(self, background)
        with table.lock.write():
            self.upkeep.changed(0)

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Search these rows exactly from now on, and absorb them some time."""
        on_device = self.engine is not None
        rows = ids.to(self.table.rows.device) if on_device else ascending(ids.cpu().numpy())
        for derived in (self.current, self.next):
            if derived is not None:
                derived.mark(rows)
        self.upkeep.changed(len(rows))

    def removed(self, ids: Int[Tensor, " n"]) -> None:
        """Search these rows no more. (Their entries count only while they are live.)"""
        on_device = self.engine is not None
        rows = ids.to(self.table.rows.device) if on_device else ids.cpu().numpy()
        for derived in (self.current, self.next):
            if derived is not None:
                derived.forget(rows)
        self.upkeep.changed(len(rows))

    def tell(self, queries: Float[Tensor, "q W"], k: int, counts: Float[Tensor, " q"]) -> None:
        """Be told which of the k results of searches counted: those as good as `counts` or better.

        From then on recall is measured, and held, on what counts of such queries: that of results
        merged from several indices is the mean of theirs, each row of the result counted once.
        """
        with self.table.lock.read():
            derived = self.current
            if derived is not None and not self._is_scan(queries):
                first = not self.sample.is_told
                self.sample.tell(queries, k, counts)
                self.upkeep.told(derived, queries, k, counts, first)

    def derive(self) -> Derivation:
        """A new index of this name, empty."""
        if self.engine is None:
            return Derived(self.table, self.metric, self.name)
        return DeviceDerived(self.table, self.metric, self.name, self.engine)

    def rebuild(self) -> None:
        """Train anew on all live rows and swap the result in, before returning."""
        self.upkeep.rebuild()

    def close(self) -> None:
        """Stop the background threads. Changed rows are no longer absorbed, but still found."""
        self.upkeep.close()

    def stats(self) -> dict[str, Any]:
        """What to watch.

        recall (as last measured on live queries; None: not yet), imbalance (1: even lists),
        buffered (changed rows searched exactly), strays (those of them that stay until the lists
        are trained anew), age (seconds since the lists were trained),
        rebuilds, bytes, effort and oversample (how hard a search looks), exact (whether all
        searches are scans at the moment), scans (searches that fell back on all rows), error
        (that ended the last upkeep, or None).
        """
        with self.table.lock.read():
            current = self.current
            buffered, strays = (0, 0) if current is None else current.buffered()
            return {
                "index": self.name,
                "imbalance": 1.0 if current is None else current.imbalance(),
                "buffered": buffered,
                "strays": strays,
                "bytes": 0 if current is None else current.num_bytes(),
                "effort": None if current is None else current.setting.effort,
                "oversample": None if current is None else current.setting.oversample,
                "scans": self.scans,
                **self.upkeep.stats(),
            }

    def found(
        self, derived: Derivation, queries: Tensor, k: int, setting: Setting | None = None
    ) -> Found:
        """The best of what an index proposes and of its buffer, scored from the rows."""
        found, unsure = derived.found(queries, k, setting)
        if unsure.any():  # on a device, where a search waits for it
            self.scans += 1
            found.scores[unsure], found.ids[unsure] = self.exact._search(queries[unsure], k)
        return found

    def deeper(self, derived: Derivation, queries: Tensor, found: Found, setting: Setting) -> Found:
        """The best of what was found and of what the index proposes at another setting."""
        k = found.ids.shape[1]
        more = derived.found(queries, k, setting)[0]
        again = (more.ids.unsqueeze(2) == found.ids.unsqueeze(1)).any(2)
        ids = torch.cat([found.ids, more.ids.masked_fill(again, MISSING)], 1)
        return best_of(torch.cat([found.scores, more.scores], 1), ids, k, self.metric)

    def serves(self, derived: Derivation) -> bool:
        """Whether the lists hold the floor of the recall, as far as is known."""
        return derived.holds and not (derived.overrun and self.min_recall is not None)

    def _is_scan(self, queries: Tensor) -> bool:
        few = self.table.num_live < self.exact_below or not len(queries)
        return self.current is None or few or not self.serves(self.current)

    def _search(self, queries: Tensor, k: int) -> Found:
        derived = self.current
        if derived is None or self._is_scan(queries):
            if derived is not None and derived.overrun:
                self.sample.add(queries, k)  # to tune the next lists by
            return self.exact._search(queries, k)
        self.sample.add(queries, k)
        found = self.found(derived, queries, k)
        self.upkeep.searched(derived, queries, found)
        return found


def ascending(ids: Any) -> Any:
    """Distinct ids [n] in order; as they mostly are."""
    return ids if (ids[1:] > ids[:-1]).all() else np.unique(ids)
