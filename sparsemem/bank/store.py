"""What happens to a bank's rows: three operations that change them, and what calls for them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.bank.book import FOREVER
from sparsemem.bank.errors import BankError
from sparsemem.bank.gradients import drop_blanks, drop_gradients
from sparsemem.bank.journal import Kind
from sparsemem.bank.tables import BoundTables, Listener
from sparsemem.devices import is_device


class RowStore(BoundTables):
    """Bound tables, and all that happens to their rows.

    Which is one of three physical operations, `_put`, `_drop` and `_flag`: written to the journal
    first, if there is one, then applied. They are called under `table.lock.write()` and without
    gradients, with checked arguments.
    """

    def add_listener(self, listener: Listener) -> None:
        """Tell `listener` of rows that go, for as long as it lives (it is not kept alive)."""
        self._listeners.add(listener)

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Be told of rows whose keys were changed in place, under `table.lock.write()`.

        Of distinct ones, unless `index.takes_repeats`.

        Row optimisers call it, and a hook for torch's own; so does whoever changes keys by hand.
        """
        with self._applying():
            if not self._untold:
                self.note_version()
            live = ids
            if not (self.index.takes_repeats and is_device(ids)):
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

    def _accessed(self, ids: Tensor, all_found: bool = False) -> None:
        found = ids.flatten()
        if not (all_found or is_device(found)) and len(found) and int(found.min()) < 0:
            found = found[found >= 0]
        self.book.accessed(found, all_found)
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

    def _set_live(self, ids: Tensor, value: bool) -> None:
        self.table.set_live(ids, value)
        if self.has_product_keys:  # whose table has marks of its own
            self.book.live.index_fill_(0, ids, value)
