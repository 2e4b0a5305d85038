"""What a bank is made of, and the three operations that change it: put, drop, flag."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparsemem.bank.arguments import check_dtype
from sparsemem.bank.book import FOREVER, RowBook
from sparsemem.bank.devices import on_device
from sparsemem.bank.errors import BankError
from sparsemem.bank.expiry import ExpirySchedule
from sparsemem.bank.gradients import drop_blanks, drop_gradients
from sparsemem.bank.journal import Journal, Kind
from sparsemem.bank.rows import fill_normal, new_tables, own
from sparsemem.bank.selection import Selection
from sparsemem.bank.usage import Room
from sparsemem.bank.watching import watch_optimisers
from sparsemem.checks import check_known, check_size
from sparsemem.indexes.base import Index
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY, make_index
from sparsemem.indexes.locks import ReadWriteLock
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.product_key import ProductTable, num_subkeys
from sparsemem.indexes.table import RowTable

RAM = "ram"
INITIAL = ("empty", "normal")
# Made anew for a copy: locks, what is derived from rows and book, and who listens.
DERIVED = ("table", "index", "journal", "_room", "_expiries", "_selection", "_listeners")


@runtime_checkable
class Listener(Protocol):
    """Who keeps something for each row beside the tables: an optimiser its state."""

    def forget(self, parameter: Tensor, ids: Int[Tensor, " n"]) -> None:
        """Be told of rows of a table whose contents went."""


class RowStore(nn.Module):
    """Tables of rows as parameters, the book on them, and an index derived from them.

    All that happens to rows is one of three physical operations, `_put`, `_drop` and `_flag`:
    written to the journal first, if there is one, then applied. They are called under
    `table.lock.write()` and without gradients, with checked arguments.
    """

    keys: nn.Parameter
    values: nn.Parameter | None  # None: the keys are the values
    book: RowBook
    table: RowTable
    index: Index
    journal: Journal | None
    _listeners: weakref.WeakSet[Listener]

    def __init__(
        self,
        num_rows: int,
        width: int,
        value_width: int | None,
        *,
        index: str,
        metric: str,
        dtype: torch.dtype,
        device: torch.device | str | None,
        storage: str | Path,
        initial: str,
        seed: int,
        index_options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.num_rows = check_size("num_rows", num_rows)
        self.width = check_size("width", width)
        self.value_width = None if value_width is None else check_size("value_width", value_width)
        check_known("metric", metric, [str(known) for known in Metric])
        check_known("initial", initial, INITIAL)
        check_size("seed", seed, 0)
        self.metric = Metric(metric)
        self.index_name, self.index_options = index, index_options
        self._allocate(check_dtype(dtype), device, storage)
        # The file that the tables lie in, for as long as they lie there.
        self._file = None if storage == RAM else (str(storage), self.keys.data_ptr())
        if initial == "normal" or self.has_product_keys:
            self._fill(initial, seed)
        self.register_load_state_dict_post_hook(_rebind_loaded)  # type: ignore[no-untyped-call]
        self._warned = False
        self._listeners, self.journal = weakref.WeakSet(), None
        self._unrecorded: list[Tensor] = []  # rows that expired and could not be logged
        self._expiries = ExpirySchedule(self.book)
        self._derive()
        self._bound_to: tuple[int, torch.dtype] | None = self.keys.data_ptr(), self.keys.dtype
        watch_optimisers()

    @property
    def arguments(self) -> dict[str, Any]:
        """What makes an empty bank like this one, as JSON has it (dtype: "float32", ...)."""
        return {
            "num_rows": self.num_rows,
            "width": self.width,
            "value_width": self.value_width,
            "index": self.index_name,
            "metric": str(self.metric),
            "dtype": str(self.keys.dtype).removeprefix("torch."),
            **self.index_options,
        }

    @property
    def tables(self) -> list[nn.Parameter]:
        """The parameters with a row an id: not product keys, where two sub-keys make a row."""
        tables = [] if self.has_product_keys else [self.keys]
        return tables if self.values is None else [*tables, self.values]

    @property
    def has_product_keys(self) -> bool:
        """Whether `keys` are sub-keys [2, S, W/2]; row n is number n // S, then n % S."""
        return self.index_name == PRODUCT_KEY

    @property
    def scans(self) -> bool:
        """Whether the index looks at rows and marks as they are: it is told of nothing.

        And misses nothing: it finds k rows where k are live.
        """
        return self.index_name in (EXACT, PRODUCT_KEY)

    @property
    def computing_dtype(self) -> torch.dtype:
        """What scores, weights and gradients are computed in: float64 for float64, else float32."""
        return self.table.dtype

    def add_listener(self, listener: Listener) -> None:
        """Tell `listener` of rows that go, for as long as it lives (it is not kept alive)."""
        self._listeners.add(listener)

    def is_trainable(self, ids: Int[Tensor, " n"], since: int | None = None) -> Bool[Tensor, " n"]:
        """Which rows take gradients: live, not frozen, and selected if there is a selection.

        since: clock time at which they were read; rows written later are other rows.
        """
        return self.book.is_trainable(ids, self.book.now if since is None else since)

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of distinct rows whose keys were changed in place, under `table.lock.write()`.

        Row optimisers call it, and a hook for torch's own; so does whoever changes keys by hand.
        """
        with self._applying():
            if not self._untold:
                self.note_version()
            live = ids
            if not (self.scans and on_device(ids)):  # or the index does nothing with them
                live = ids[self.book.live.index_select(0, ids)]
            self.index.changed(live)
        if self.journal is not None:
            self.journal.touched(ids, self.keys)

    def expect_change(self) -> None:
        """Be told, under `table.lock.write()`, that keys are about to be changed in place.

        So what somebody else changed before, and did not tell of, is not taken for told.
        """
        self._untold |= self.keys._version != self._known_version
        if self.journal is not None:
            self.journal.expect_change()

    def note_version(self) -> None:
        """What changed the keys so far has told of it."""
        self._known_version, self._untold = self.keys._version, False

    def refresh(self) -> None:
        """Have the index look at all keys if they were changed in place and nobody told.

        Warns the first time: that costs O(N).
        """
        self._rebind_if_due()
        if self.keys._version == self._known_version or self.has_product_keys:
            return  # product keys are searched as they are
        with self.table.lock.read():  # not in the middle of an optimiser's step
            version = self.keys._version
        if version == self._known_version:
            return
        if not self._warned:
            self._warned = True
            warnings.warn(
                "keys were changed in place and the bank was not told: all of them are looked at"
                " anew, which takes long. Use bank.write(ids, rows), or call bank.changed(ids)"
                " under bank.table.lock.write()",
                stacklevel=3,
            )
        self.index.rebuild()
        if self.journal is not None:
            self.journal.touched(self.book.live.nonzero().squeeze(1))
        self._known_version, self._untold = version, False

    def rebind(self) -> None:
        """Derive table, index and counts anew from the parameters and the book: O(N).

        Done by itself after `to`, `load_state_dict` and copying.
        """
        self._rebind(lambda: True)

    def _rebind_if_due(self) -> None:
        if not self._is_bound():
            self._rebind(lambda: not self._is_bound())

    def _rebind(self, is_due: Callable[[], bool]) -> None:
        """`is_due`: still, that is: of the threads that see it at once the first one does it."""
        lock, old = self.table.lock, None
        with lock.write():
            if is_due():
                self._bound_to, old = None, self.index
                self._derive(lock)
                self._count()
                if self.journal is not None:
                    self.journal.touched(None)
        # Under the lock its threads, which are waited for here, could wait for this one.
        if old is not None and not lock.is_writing():
            old.close()

    def _count(self) -> None:
        """Count what the book holds: now the tables are bound."""
        self.book.recount()
        self._room.find_removed()
        expiries = ExpirySchedule(self.book)
        expiries.restart()
        self._expiries = expiries  # whole: others look at it without the lock
        self._bound_to = self.keys.data_ptr(), self.keys.dtype

    def _derive(self, lock: ReadWriteLock | None = None) -> None:
        """`lock`: of the table so far, which others may hold or wait for."""
        for parameter in self.parameters(recurse=False):
            own(parameter, self)  # type: ignore[arg-type]
        self._room = Room(self.book)
        self._selection = Selection(self.book)
        if self.has_product_keys:
            self.table = ProductTable(self.keys.data, ~self.book.live)
        else:
            self.table = RowTable(self.keys.data, self.book.live)
        if lock is not None:
            self.table.lock = lock
        with self.table.lock.write():
            self.index = make_index(self.index_name, self.table, self.metric, **self.index_options)
        self.note_version()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Alone, without gradients, and with rows out that go at the next call."""
        self._rebind_if_due()
        with torch.no_grad(), self.table.lock.write():
            self._expire_before(self.book.now + 1)
            self._record_expired()
            yield

    @contextmanager
    def _applying(self) -> Iterator[None]:
        """An operation that stops half-way (Ctrl-C) leaves what is derived to be made anew."""
        try:
            yield
        except BaseException:
            self._bound_to = None
            raise

    def _expire_before(self, time: int) -> None:
        if self._expiries.next > time:
            return
        with torch.no_grad(), self.table.lock.write():
            while self._expiries.next <= time:
                ids = self._expiries.rows()
                if len(ids):
                    self._expire(ids)
                self._expiries.advance()

    def _expire(self, ids: Tensor) -> None:
        """Rows go, also where they cannot be logged: a read must not fail for that.

        In a folder they go by their expiry at the latest, as here; see `_record_expired`.
        """
        try:
            self._drop(ids)
        except BankError:  # closed, of another dtype than the shards, a full disk
            assert self.journal is not None
            self.journal.touched(ids)
            self._unrecorded.append(ids)
            self._apply_drop(ids)

    def _record_expired(self) -> None:
        """Log what expired unlogged, before a change that may put other rows in its place."""
        if self._unrecorded and self.journal is not None:
            ids = torch.cat(self._unrecorded)
            gone = ids[~self.book.live.index_select(0, ids)]  # not all after load_state_dict
            if len(gone):
                self.journal.record(Kind.DROP, gone, {})
        self._unrecorded.clear()

    def count_call(self) -> None:
        """Count one call of the usage clock; rows go whose time is over by then."""
        self._expire_before(self.book.tick())

    def used(self, ids: Int[Tensor, " n"]) -> int:
        """Count one call of the usage clock and an access of each of these rows; its time.

        To be called under `table.lock.read()`, by who reads rows without `read`.
        """
        now = self.book.tick()
        self._accessed(ids)
        return now

    def _accessed(self, ids: Tensor) -> None:
        found = ids.flatten()
        if not on_device(found):
            found = found[found >= 0]
        self.book.accessed(found)
        self._selection.accessed(found)

    def _put(
        self,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n W"] | None,
        values: Float[Tensor, "n V"] | None,
        tags: Int[Tensor, " n"],
        expiry: Int[Tensor, " n"],
        anew: bool = False,
    ) -> None:
        """Rows are there (None: as they were), accessed now. `anew`: they are other rows."""
        if self.journal is not None:
            given = {"rows": rows, "values": values, "tags": tags, "expiry": expiry}
            arrays = {name: array for name, array in given.items() if array is not None}
            self.journal.record(Kind.NEW if anew else Kind.PUT, ids, arrays)
        with self._applying():
            if anew:
                self.book.clear(ids)
                self._forget(ids)
            going = (expiry != FOREVER) & (expiry != self.book.expiry.index_select(0, ids))
            self.book.enter(ids, tags, expiry)
            if rows is not None:
                self.table.put(ids, rows)
            elif not self.book.live.index_select(0, ids).all():
                self._set_live(ids, True)  # product keys: the sub-keys make the row
            if self.values is not None and values is not None:
                self.values.data.index_copy_(0, ids, values)
            if rows is not None or values is not None:
                drop_gradients(self, ids)
                self.book.wrote(ids)
            self._expiries.add(ids[going], expiry[going])
            self._expiries.tidy(self.table.num_live)
            if rows is not None:
                self.index.changed(ids)

    def _drop(self, ids: Int[Tensor, " n"]) -> None:
        """Live rows are gone."""
        if self.journal is not None:
            self.journal.record(Kind.DROP, ids, {})
        self._apply_drop(ids)

    def _apply_drop(self, ids: Tensor) -> None:
        with self._applying():
            self._set_live(ids, False)
            self.book.clear(ids)
            self._room.removed(ids)
            drop_gradients(self, ids)
            self._forget(ids)
            self.index.removed(ids)

    def _flag(self, ids: Int[Tensor, " n"], frozen: Bool[Tensor, " n"]) -> None:
        """Live rows are frozen, or not any more."""
        if self.journal is not None:
            self.journal.record(Kind.FLAG, ids, {"frozen": frozen})
        with self._applying():
            drop_blanks(self)
            self.book.flag(ids, frozen)
            if not frozen.all():
                self._room.released()

    def _forget(self, ids: Tensor) -> None:
        for listener in list(self._listeners):
            for parameter in self.tables:
                listener.forget(parameter, ids)

    def _allocate(
        self, dtype: torch.dtype, device: torch.device | str | None, storage: str | Path
    ) -> None:
        """The tables and the book on them, all zero."""
        shapes: list[tuple[int, ...]] = [(self.num_rows, self.width)]
        if self.has_product_keys:
            if self.width % 2:
                raise ValueError(f"width is {self.width}, expected an even one: keys have halves")
            shapes = [(2, num_subkeys(self.num_rows), self.width // 2)]
        if self.value_width is not None:
            shapes.append((self.num_rows, self.value_width))
        try:
            tables = new_tables(shapes, dtype, device, None if storage == RAM else Path(storage))
            self.book = RowBook(self.num_rows, device)
        except MemoryError as error:
            sizes = f"width is {self.width}, value_width is {self.value_width}"
            raise MemoryError(f"num_rows is {self.num_rows}, {sizes}: {error}") from None
        self.keys = nn.Parameter(tables[0])
        self.values = nn.Parameter(tables[1]) if len(tables) > 1 else None

    def _fill(self, initial: str, seed: int) -> None:
        """All rows are there from the start."""
        generator = torch.Generator().manual_seed(seed)
        fill_normal(self.keys.data.flatten(0, -2), generator, self.width**-0.5)
        if self.values is not None and initial == "normal":
            fill_normal(self.values.data, generator, self.values.shape[1] ** -0.5)
        self.book.live.fill_(True)

    def _set_live(self, ids: Tensor, value: bool) -> None:
        self.table.set_live(ids, value)
        if self.has_product_keys:  # whose table has marks of its own
            self.book.live.index_fill_(0, ids, value)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RowStore:
        place = fn(torch.empty(0, dtype=self.keys.dtype, device=self.keys.device)).device
        if self._file is not None and self._file[1] == self.keys.data_ptr() and place.type != "cpu":
            raise ValueError(
                f"cannot move to {place}: the bank's tables lie in the file {self._file[0]!r},"
                " expected storage='ram'; save it, and load it on the device"
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._rebind_if_due()
        return self

    def _is_bound(self) -> bool:
        """Whether the table is of the keys as they lie: not moved, replaced or half written."""
        return (self.keys.data_ptr(), self.keys.dtype) == self._bound_to

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._listeners, self.journal, self._unrecorded = weakref.WeakSet(), None, []
        self._derive()
        self._count()


def _rebind_loaded(store: RowStore, _incompatible: Any) -> None:
    store.rebind()
