"""What a bank is made of, and what is derived from it, anew where the tables were moved."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparsemem.bank.arguments import check_dtype
from sparsemem.bank.book import RowBook
from sparsemem.bank.expiry import ExpirySchedule
from sparsemem.bank.journal import Journal
from sparsemem.bank.rows import fill_normal, new_tables, own
from sparsemem.bank.selection import Selection
from sparsemem.bank.usage import Room
from sparsemem.bank.watching import watch_optimisers
from sparsemem.checks import check_known, check_size
from sparsemem.indexes.base import Index
from sparsemem.indexes.factory import PRODUCT_KEY, make_index
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


class BoundTables(nn.Module):
    """Tables of rows as parameters, the book on them, and what is bound to both.

    Bound: the table and the index over the keys where they lie, and counts of what the book holds.
    All of it is made anew when the keys lie elsewhere: after `to`, loading, copying.
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
    def computing_dtype(self) -> torch.dtype:
        """What scores, weights and gradients are computed in: float64 for float64, else float32."""
        return self.table.dtype

    def is_trainable(self, ids: Int[Tensor, " n"], since: int | None = None) -> Bool[Tensor, " n"]:
        """Which rows take gradients: live, not frozen, and selected if there is a selection.

        since: clock time at which they were read; rows written later are other rows.
        """
        return self.book.is_trainable(ids, self.book.now if since is None else since)

    def note_version(self) -> None:
        """What changed the keys so far has told of it."""
        self._known_version, self._untold = self.keys._version, False

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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> BoundTables:
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


def _rebind_loaded(tables: BoundTables, _incompatible: Any) -> None:
    tables.rebind()
