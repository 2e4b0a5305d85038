"""Changed rows beside an index on a device, kept so that telling of a change waits for nothing."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.indexes.base import MISSING
from sparsemem.indexes.device_ranking import Entries, current_entries
from sparsemem.indexes.device_scan import device_scan
from sparsemem.indexes.exact import SPARE, likely_bounds
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.table import RowTable

FIRST_CAPACITY = 16_384  # a log that is full is tidied, which waits for the device
SCANNED_NUMBERS = 2**25  # bounds taken at once


def buffer_bytes(num_rows: int, row_bytes: int, most: int = 0) -> int:
    """Memory of the buffer of a table of so many rows, of so many bytes each.

    most: entries that its log had to hold at once, but for those that later ones had replaced.
    """
    log = max(FIRST_CAPACITY, 2 * most)  # as much room again: see `_reserve`
    return num_rows * torch.int32.itemsize + log * (torch.int64.itemsize + row_bytes)


class DeviceBuffer:
    """Rows of a table that an index does not know as they are now.

    A log: a change appends its rows, packed, where the host has counted up to, so that it need not
    know which of them were there already. `place` points to a row's latest entry; the entries
    before that are passed over, until `tidy` drops them, which waits for the device. So `count`
    and `waiting` are bounds from above, exact after `tidy`. The first `strays` entries have been
    looked at and stay; a row that changes again waits again, behind all others.

    What changes anything is called under the table's write lock, the rest under its read lock.
    """

    def __init__(self, table: RowTable) -> None:
        self.table = table
        device = table.rows.device
        self.count = self.strays = 0
        self.settled = 0  # rows in it when it was last tidy
        self._replaced = 0  # entries, since that was last asked for; less, if some do not count
        self.marked = 0  # entries so far, but for those that were settled
        self.version = 0  # of the entries' order
        # By row: one more than the place of its latest entry; 0: it has none.
        self.place = torch.zeros(table.num_rows, dtype=torch.int32, device=device)
        self.ids = torch.empty(FIRST_CAPACITY, dtype=torch.int64, device=device)
        self._rows = table.rows.new_empty(FIRST_CAPACITY, table.width)

    @property
    def waiting(self) -> int:
        """Entries to be looked at."""
        return self.count - self.strays

    def holds(self, ids: Int[Tensor, "*S"]) -> Bool[Tensor, "*S"]:
        """Which of the rows are here."""
        return self.place[ids] > 0

    def mark(self, ids: Int[Tensor, " n"]) -> None:
        """Rows have changed. (Those that are not live are passed over.)"""
        end = self.count + len(ids)
        if end > len(self.ids):
            self.tidy()
            self._reserve(self.count + len(ids))
            end = self.count + len(ids)
        self.ids[self.count : end] = ids
        self._rows[self.count : end] = self.table.rows.index_select(0, ids)
        latest = torch.arange(self.count + 1, end + 1, dtype=torch.int32, device=ids.device)
        self.place.scatter_reduce_(0, ids, latest, "amax")  # of a row told twice, the last
        self.count = end
        self.marked += len(ids)

    def drop(self, ids: Int[Tensor, " n"]) -> None:
        """Rows leave, where they are here."""
        self.place.index_fill_(0, ids, 0)

    def tidy(self) -> None:
        """Keep every row's latest entry alone. Waits for the device, twice."""
        later = self._later()
        kept = self._latest(later).nonzero().squeeze(1)
        strays, replaced = torch.stack([(kept < self.strays).sum(), (later > 0).sum()]).tolist()
        self._keep(kept, strays)
        self._replaced = max(0, self._replaced + replaced)

    def take_replaced(self) -> int:
        """How many entries were found to be replaced by a later one, since the last call."""
        replaced = max(0, self._replaced)
        self._replaced -= replaced
        return replaced

    def forget_replaced(self) -> None:
        """Do not count what replaces entries that are here now: as many as it can be at most."""
        self._replaced = self.settled - self.count

    def counts(self) -> tuple[int, int]:
        """Rows that are here, exactly, and how many of them are strays. Waits for the device."""
        latest = self._latest()
        rows, strays = torch.stack([latest.sum(), latest[: self.strays].sum()]).tolist()
        return rows, strays

    def longest(self, count: int) -> Int[Tensor, " n"]:
        """The ids of the `count` rows that have waited longest, or of all; of a tidy buffer."""
        return self.ids[self.strays : self.count][:count].clone()

    def unchanged(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of the `longest` are as they were, if the `version` still is the same."""
        latest = self.place[ids] == torch.arange(len(ids), device=ids.device) + self.strays + 1
        return latest & self.table.is_live(ids)

    def rest(self, ids: Int[Tensor, " n"]) -> None:
        """Rows that wait need not be looked at again until they change."""
        latest = self._latest()
        stays = torch.zeros_like(latest)
        stays[: self.strays] = True
        stays[self.place[ids].long() - 1] = True
        order = (latest & stays).nonzero().squeeze(1)
        self._keep(torch.cat([order, (latest & ~stays).nonzero().squeeze(1)]), len(order))

    def best(
        self, metric: Metric, queries: Float[Tensor, "Q W"], k: int
    ) -> tuple[Int[Tensor, "Q C"], Float[Tensor, " Q"]]:
        """Rows that are among the best of the buffer, id -1 after them; and a bound of the others.

        No other row is worth more than that. Once the k-th best of these is known to be worth
        more, nothing is missing.
        """
        if not self.count:
            ids = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
            return ids, queries.new_full((len(queries),), -torch.inf)
        latest, rows = self._latest(), self._rows[: self.count].to(self.table.dtype)
        tops = []
        for some in torch.split(queries, max(1, SCANNED_NUMBERS // self.count)):
            bounds, certain = likely_bounds(metric, some, rows)
            bounds.masked_fill_(~certain, torch.inf).masked_fill_(~latest, -torch.inf)
            tops.append(bounds.topk(min(k + SPARE, self.count), 1))
        bounds, places = (torch.cat(parts) for parts in zip(*tops, strict=True))
        ids = self.ids[places].masked_fill(bounds == -torch.inf, MISSING)
        beyond = bounds[:, -1]
        return ids, beyond if bounds.shape[1] < self.count else torch.full_like(beyond, -torch.inf)

    def nearest(self, metric: Metric, queries: Float[Tensor, "Q W"], k: int) -> Int[Tensor, "Q B"]:
        """As `best`, by kernels: places of entries, best first, and some beyond k; -1: no more."""
        if not self.count:
            return torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
        current = current_entries(self.ids, self.place, self.table.live, self.count)
        entries = Entries(self._rows, current, self.count)
        return device_scan(entries, metric, queries, k + SPARE).ids

    def num_bytes(self) -> int:
        """Memory of the entries and of the places."""
        return int(self._rows.nbytes + self.ids.nbytes + self.place.nbytes)

    def _later(self) -> Int[Tensor, " n"]:
        """How many places behind each entry its row's latest is; negative: the row has left."""
        ids = self.ids[: self.count]
        own = torch.arange(1, self.count + 1, dtype=torch.int32, device=ids.device)
        return self.place[ids] - own

    def _latest(self, later: Int[Tensor, " n"] | None = None) -> Bool[Tensor, " n"]:
        """Which entries are the latest of a live row. later: `_later`, where that is known."""
        later = self._later() if later is None else later
        return (later == 0) & self.table.is_live(self.ids[: self.count])

    def _keep(self, order: Int[Tensor, " n"], strays: int) -> None:
        """Keep these entries, in this order."""
        ids, rows = self.ids[order], self._rows[order]  # nothing has changed if there is no room
        places = torch.arange(1, len(ids) + 1, dtype=torch.int32, device=ids.device)
        self.place.index_fill_(0, self.ids[: self.count], 0)
        self.place.index_copy_(0, ids, places)
        self.ids[: len(ids)], self._rows[: len(ids)] = ids, rows
        self.count = self.settled = len(ids)
        self.strays = strays
        self.version += 1

    def _reserve(self, count: int) -> None:
        """Room for so many entries and as many more, so that it is seldom asked for."""
        if 2 * count <= len(self.ids):
            return
        ids = self.ids.new_empty(2 * count)
        rows = self._rows.new_empty(2 * count, self.table.width)
        ids[: self.count], rows[: self.count] = self.ids[: self.count], self._rows[: self.count]
        self.ids, self._rows = ids, rows
