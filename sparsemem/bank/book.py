"""What is known of each row of a bank beside its contents."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparsemem.bank.rows import zeros
from sparsemem.devices import is_device

FOREVER = 0  # as an expiry: the row has no time to live
NO_TAG = 0
COLUMNS = (
    ("live", torch.bool),
    ("frozen", torch.bool),
    ("tags", torch.int64),
    ("expiry", torch.int64),  # clock time at which the row goes; FOREVER: never
    ("last_access", torch.int64),  # clock time; of a row that is not live, 0: never used
    ("accesses", torch.int64),
    ("written", torch.int64),  # clock time of the last write
    ("background", torch.int32),  # background batches that accessed the row (see selection.py)
)
COUNTERS = ("clock", "batches")


class RowBook(nn.Module):
    """One entry a row: live, frozen, tag, expiry, last access, number of accesses, ...

    All start at zero, lazily: a table of 10^8 rows costs only the pages that are touched. The
    clock counts the calls that read or write; it stays on the CPU, since every call looks at it.
    Whoever changes entries holds the table's lock for writing; readers, who run in parallel, mark
    accesses under a lock of the book's own.
    """

    live: Tensor
    frozen: Tensor
    tags: Tensor
    expiry: Tensor
    last_access: Tensor
    accesses: Tensor
    written: Tensor
    background: Tensor
    selected: Tensor
    selection: Tensor | None
    clock: Tensor
    batches: Tensor

    def __init__(self, num_rows: int, device: torch.device | str | None) -> None:
        super().__init__()
        for name, dtype in COLUMNS:
            self.register_buffer(name, zeros(num_rows, dtype=dtype, device=device))
        selected = zeros(num_rows, dtype=torch.bool, device=device)
        self.register_buffer("selected", selected, persistent=False)
        self.register_buffer("clock", torch.zeros((), dtype=torch.int64))  # calls so far
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))  # of the background
        # Where there is a selection, only its rows are trainable; `selected` marks them.
        self.register_buffer("selection", None, persistent=False)
        self.num_frozen = 0
        self.last_written = 0  # clock time of the last write of any row, or later
        self._lock = threading.Lock()

    @property
    def now(self) -> int:
        """The clock: calls so far."""
        return int(self.clock)

    def tick(self) -> int:
        """Count one call; its time."""
        with self._lock:
            return int(self.clock.add_(1))

    def accessed(self, ids: Int[Tensor, " n"], all_found: bool = False) -> None:
        """Mark accesses, at the present time. Repeated ids count as often.

        On a device an id of -1 is no row, which `all_found` says is nowhere.
        """
        with self._lock:
            if is_device(ids) and not all_found:
                found = ids >= 0  # what is no row is a look at row 0 that leaves it as it is
                ids, count = ids.clamp(min=0), found.to(self.accesses.dtype)
                self.last_access.scatter_reduce_(0, ids, count * self.now, "amax")
            else:
                count = torch.ones_like(ids)
                self.last_access.index_fill_(0, ids, self.now)
            self.accesses.index_add_(0, ids, count)

    def wrote(self, ids: Int[Tensor, " n"]) -> None:
        """Mark a write and an access of distinct rows, at the present time."""
        self.written.index_fill_(0, ids, self.now)
        self.last_written = self.now
        self.accessed(ids)

    def enter(
        self, ids: Int[Tensor, " n"], tags: Int[Tensor, " n"], expiry: Int[Tensor, " n"]
    ) -> None:
        """Note tags and expiry of distinct rows."""
        self.tags.index_copy_(0, ids, tags)
        self.expiry.index_copy_(0, ids, expiry)

    def flag(self, ids: Int[Tensor, " n"], frozen: Bool[Tensor, " n"]) -> None:
        """Mark distinct rows as frozen or not."""
        before = int(self.frozen.index_select(0, ids).count_nonzero())
        self.frozen.index_copy_(0, ids, frozen)
        self.num_frozen += int(frozen.count_nonzero()) - before

    def clear(self, ids: Int[Tensor, " n"]) -> None:
        """Forget what is known of distinct rows, but that they were used."""
        self.flag(ids, torch.zeros_like(ids, dtype=torch.bool))
        for column in (self.tags, self.expiry, self.accesses, self.background, self.selected):
            column.index_fill_(0, ids, 0)
        # Rows that were there from the start may never have been accessed.
        used = self.last_access.index_select(0, ids).clamp_(min=1)
        self.last_access.index_copy_(0, ids, used)

    def is_trainable(self, ids: Int[Tensor, " n"], since: int) -> Bool[Tensor, " n"]:
        """Which rows may take a gradient of what was read at time `since` (-1: no row)."""
        safe = ids.clamp(min=0)
        result = (ids >= 0) & self.live.index_select(0, safe)
        if self.num_frozen:
            result &= ~self.frozen.index_select(0, safe)
        if self.last_written > since:
            result &= self.written.index_select(0, safe) <= since
        if self.selection is not None:
            result &= self.selected.index_select(0, safe)
        return result

    def recount(self) -> None:
        """Derive the counts anew after the columns were replaced: O(N)."""
        for name in COUNTERS:
            setattr(self, name, getattr(self, name).cpu())
        self.num_frozen = int(self.frozen.count_nonzero())
        self.last_written = self.now

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RowBook:
        """The counters stay where they are, on the CPU."""
        counters = {name: self._buffers.pop(name) for name in COUNTERS}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(counters)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
