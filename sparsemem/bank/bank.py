"""MemoryBank: millions of rows that outlive a sequence, found by content.

Letters: N rows, W width of keys, V width of values, K rows read a query, n rows of a call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.bank.arguments import (
    check_bank_ids,
    check_index,
    check_live,
    check_table,
    check_tags,
    check_ttl,
)
from sparsemem.bank.book import FOREVER, NO_TAG
from sparsemem.bank.folder import check_new_place, create_folder, load_bank, save_bank
from sparsemem.bank.gradients import drop_blanks
from sparsemem.bank.reading import Hit, check_read, find
from sparsemem.bank.rows import gather, gather_pairs, new_storage
from sparsemem.bank.selection import check_policy
from sparsemem.bank.store import RowStore
from sparsemem.bank.tables import RAM
from sparsemem.checks import check_at_most, check_size
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY

OwnKind = TypeVar("OwnKind", bound="MemoryBank")
WHOLE = "their rows are all pairs of sub-keys and cannot be written, but write(ids, values=...) can"


class MemoryBank(RowStore):
    """A table of N rows that are found by content, trained by row-sparse gradients, or written.

    A row has a key [W] and a value [V]; without `value_width` the key is the value. Rows are
    *live* once they are written (or from the start, with `initial`), until they are removed;
    only live rows are found. Reading marks rows as used: when all are live, the least recently
    used give way to new ones. Any number of threads may read while others write.

    `keys` and `values` are parameters whose gradients are sparse tensors with an entry for each
    row read. Optimisers: `sparsemem.optim`, or torch's SGD, SparseAdam and Adagrad.

    Args:
        num_rows: N. Rows take memory only once they are written.
        width: W.
        value_width: V. None: the keys are the values.
        index: how rows are found: "exact", a FAISS factory string such as "IVF4096,Flat", or
            "product-key": `keys` are two lists of S sub-keys [2, S, W/2], of random numbers
            N(0, 1/W), that make N = S^2 rows, all live; only values are written.
        metric: "cosine", "ip" (inner product) or "l2" (squared distance).
        min_recall: floor of the recall that a FAISS index is tuned for while rows change; None:
            it is not. Rows that drift faster than the machine keeps up with can push it under
            the floor until the index is trained anew (`stats()["recall"]`). The other kinds
            are exact.
        dtype: of the tables: float32, bfloat16, float16 or float64. Whatever it is, scores and
            gradients are computed in float32 (float64 for float64).
        device: where all of it is, but for the usage clock. On a GPU the host waits once a read
            (queries are finite), for FAISS once more, and in the backward pass only where rows
            that were read went, or were written, since, or fewer than `top_k` rows are live.
            Threads are to use it on one stream, as they do unless they choose another.
        path: a new folder in which the bank is durable: a write that has returned is there after
            the process is killed. See `save` and `load`.
        sync: wait at each write until it is on the disk: it survives the machine, too.
        storage: "ram", or a new file that holds the tables, mapped into memory. The file is
            sparse: see to it that the disk has room for what will be written, as the system
            kills a process that writes beyond it.
        initial: "empty", or "normal": all rows live, of N(0, 1/W), values of N(0, 1/V). With
            product keys "empty" means values of zero.
        seed: of those numbers.
        index_options: of the index's class, such as background=False (see `FreshIndex`).
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        value_width: int | None = None,
        *,
        index: str = EXACT,
        metric: str = "cosine",
        min_recall: float | None = 0.95,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        path: str | Path | None = None,
        sync: bool = False,
        storage: str | Path = RAM,
        initial: str = "empty",
        seed: int = 0,
        **index_options: Any,
    ) -> None:
        check_index(index, min_recall, value_width)
        _check_place(path, sync)
        if index not in (EXACT, PRODUCT_KEY):
            index_options["min_recall"] = min_recall
        with new_storage(None if storage == RAM else Path(storage)):
            super().__init__(
                num_rows,
                width,
                value_width,
                index=index,
                metric=metric,
                dtype=dtype,
                device=device,
                storage=storage,
                initial=initial,
                seed=seed,
                index_options=index_options,
            )
            if path is not None:
                self.journal = create_folder(self, path, sync)

    def save(self, path: str | Path | None = None) -> None:
        """Make all of a durable bank durable, or write a snapshot of any bank to a new folder.

        Without a path, or with its own, a durable bank writes what changed since the last save,
        and begins its log anew. Writes are durable without a save; the steps of optimisers, usage
        by reads, and `load_state_dict` become so here. Other threads may read and write meanwhile.

        With another path, the bank is written whole into a folder that appears whole or not at
        all; writers wait meanwhile. docs/bank-format.md specifies both.

        BankError where that fails (the disk is full, the folder is not new, rows hold NaN or
        infinity): what was durable still is.
        """
        save_bank(self, path)

    @classmethod
    def load(
        cls: type[OwnKind],
        path: str | Path,
        *,
        storage: str | Path = RAM,
        device: torch.device | str | None = None,
    ) -> OwnKind:
        """The bank of a folder: a durable one goes on in it, a snapshot leaves it alone.

        `storage` and `device` as in the constructor. Every byte is checked; BankError names the
        file that is damaged, and where, or says that another process has the bank open. What a
        crash left of a write that had not returned is cut off, with a warning.
        """
        with new_storage(None if storage == RAM else Path(storage)):
            return load_bank(cls, path, storage=storage, device=device)

    def read(self, queries: Float[Tensor, "*Q W"], top_k: int) -> Hit:
        """The top_k best live rows of each query.

        Differentiable in the queries, and in keys and values by row-sparse gradients: rows that
        are frozen, not selected, removed or written anew by the time of the backward pass get
        none. Computed in float32 (float64 for float64 rows), under autocast too. Counts as one
        call of the usage clock, and as an access of each row found, as often as it was found.
        """
        check_read(self, queries, top_k)
        self.refresh()
        self.count_call()
        with torch.autocast(self.keys.device.type, enabled=False), self.table.lock.read():
            found = find(self, queries, top_k)
            values = found.rows
            if self.values is not None:
                values = gather(self.values, found.ids, self, found.complete)
        shape = queries.shape[:-1]
        parts = (found.rows, values, found.scores, found.ids)
        return Hit(*(part.view(*shape, *part.shape[1:]) for part in parts))

    forward = read

    def gather(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Keys at ids (-1: zeros); differentiable. Not an access."""
        with self.table.lock.read():
            if self.has_product_keys:
                return gather_pairs(self.keys, ids, self.computing_dtype)
            return gather(self.keys, ids, self)

    def append(
        self,
        rows: Float[Tensor, "n W"],
        values: Float[Tensor, "n V"] | None = None,
        *,
        tags: int | Int[Tensor, " n"] | None = None,
        ttl: int | None = None,
    ) -> Int[Tensor, " n"]:
        """Store new rows; returns their ids.

        They take rows never used, then removed ones, lowest ids first, then the live rows that
        are least recently used, by (last access, id); frozen rows never give way. ValueError if
        there are not enough.

        Args:
            rows: keys, or keys and values in one.
            values: None: zeros.
            tags: a number to remove them by, one for all or one a row; None or 0: none.
            ttl: calls of the usage clock after this one in which they are still found; None or
                0: forever.
        """
        if self.has_product_keys:
            raise ValueError(f"append is not for product keys: {WHOLE}")
        rows = check_table("rows", rows, None, self.width, self.keys)
        values = self._checked_values(values, len(rows))
        new_tags = check_tags(NO_TAG if tags is None else tags, len(rows), self.keys.device)
        ttl = check_ttl(ttl)
        with self._changing():
            limit = self.num_rows - self.book.num_frozen
            check_at_most("len(rows)", len(rows), "num_rows - frozen rows", limit)
            now = self.book.tick()
            ids = self._room.choose(len(rows))
            if values is None and self.values is not None:
                values = self.values.new_zeros(len(rows), self.values.shape[1])
            expiry = torch.full_like(ids, now + ttl + 1 if ttl else FOREVER)
            self._put(ids, rows, values, new_tags, expiry, anew=True)
        return ids

    def write(
        self,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n W"] | None = None,
        values: Float[Tensor, "n V"] | None = None,
        *,
        tags: int | Int[Tensor, " n"] | None = None,
        ttl: int | None = None,
    ) -> None:
        """Overwrite rows, frozen ones too; they are live and found from now on.

        What is None stays as it is: a row that was not live then gets zeros as its value, no
        tag and no time to live, and must be given `rows`. tags=0 and ttl=0 take those away.
        """
        check_bank_ids(ids, self.num_rows, self.keys.device)
        if rows is None and values is None and tags is None and ttl is None:
            raise ValueError("nothing to write, expected rows, values, tags or ttl")
        if rows is not None:
            if self.has_product_keys:
                raise ValueError(f"rows is given, expected None with product keys: {WHOLE}")
            rows = check_table("rows", rows, len(ids), self.width, self.keys)
        values = self._checked_values(values, len(ids))
        new_tags = None if tags is None else check_tags(tags, len(ids), self.keys.device)
        check_ttl(ttl)
        with self._changing():
            if rows is None and not self.has_product_keys:
                check_live(ids, self.book.live, "expected rows to write there")
            now = self.book.tick()
            if new_tags is None:
                new_tags = self.book.tags.index_select(0, ids)
            expiry = self.book.expiry.index_select(0, ids)
            if ttl is not None:
                expiry = torch.full_like(ids, now + ttl + 1 if ttl else FOREVER)
            self._put(ids, rows, self._values_or_zeros(ids, values), new_tags, expiry)

    def remove(
        self, ids: Int[Tensor, " n"] | None = None, *, tag: int | None = None
    ) -> Int[Tensor, " removed"]:
        """Take rows out, by id or all those of a tag, frozen ones too; returns which were live.

        By tag it costs O(N).
        """
        if (ids is None) == (tag is None):
            raise ValueError(f"ids is {ids} and tag is {tag}, expected one of them")
        if ids is not None:
            check_bank_ids(ids, self.num_rows, self.keys.device)
        if tag is not None:
            check_size("tag", tag, 1)
        with self._changing():
            if ids is None:
                ids = self.book.tags.eq(tag or NO_TAG).nonzero().squeeze(1)
            ids = ids[self.book.live.index_select(0, ids)]
            if len(ids):
                self._drop(ids)
        return ids

    def expire(self) -> None:
        """Take out rows whose time to live is over. Reads and writes do so by themselves."""
        self._expire_before(self.book.now + 1)

    def freeze(self, ids: Int[Tensor, " n"] | None = None) -> None:
        """From now on rows take no gradient and do not give way to new ones. None: all live rows.

        They can still be written and removed. The row optimisers and torch's SGD, SparseAdam and
        Adagrad leave them alone (SGD forgets their momentum); another optimiser may move them.
        """
        self._set_frozen(ids, True)

    def unfreeze(self, ids: Int[Tensor, " n"] | None = None) -> None:
        """Undo `freeze`. None: of all rows."""
        self._set_frozen(ids, False)

    def background(self) -> AbstractContextManager[None]:
        """What is read in the `with` block is one batch of the background for `select`."""
        return self._selection.background()

    def select(
        self, policy: str | None = "tf-idf", top: int | None = None
    ) -> Int[Tensor, " n"] | None:
        """Train only the rows that new data uses far more than the background did.

        Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103). A row's score is
        tf * log((B + 1) / (df + 1)): tf is its share of the accesses by reads outside the
        background since the last call of `select`, B the number of background batches (blocks
        of `background()`), df in how many of those it was accessed. The `top` rows with the
        greatest scores (ties: more accesses, then lower id) are trainable from now on, also by
        backward passes of what was read before. The usual order is: read, select, backward, step.

        Returns the ids of the rows selected, ascending: fewer than `top` if fewer trainable rows
        were read. `select(None)` makes all rows trainable again and returns None.
        """
        check_policy(policy, top)
        with torch.no_grad(), self.table.lock.write():
            drop_blanks(self)
            if policy is None or top is None:
                self._selection.lift()
                return None
            return self._selection.select(top)

    def capacity(self) -> int:
        """Rows that could give way to new ones: all that are not frozen."""
        return self.num_rows - self.book.num_frozen

    def tags_of(self, ids: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """Tags of rows; 0 where there is none, or where the id is -1."""
        tags = self.book.tags.index_select(0, ids.flatten().clamp(min=0)).view(ids.shape)
        return tags.masked_fill(ids < 0, NO_TAG)

    def stats(self) -> dict[str, Any]:
        """Figures to watch: those of the bank, and those of the index under their own names.

        num_rows, num_live, num_frozen, clock (calls so far), table_bytes (tables and book, if
        all of their pages were touched).
        """
        tensors = [*self.parameters(), *self.buffers()]
        return {
            "num_rows": self.num_rows,
            "num_live": self.table.num_live,
            "num_frozen": self.book.num_frozen,
            "clock": self.book.now,
            "table_bytes": sum(tensor.nbytes for tensor in tensors),
            **self.index.stats(),
        }

    def close(self) -> None:
        """Stop what runs in the background, and let go of a durable bank's folder.

        Rows can still be read, and written unless the bank was durable.
        """
        self.index.close()
        if self.journal is not None:
            self.journal.close()

    def extra_repr(self) -> str:
        """What a module prints of itself."""
        widths = (
            str(self.width) if self.value_width is None else f"{self.width}, {self.value_width}"
        )
        return f"{self.num_rows}, {widths}, index={self.index_name!r}, metric={str(self.metric)!r}"

    def _set_frozen(self, ids: Tensor | None, frozen: bool) -> None:
        if ids is not None:
            check_bank_ids(ids, self.num_rows, self.keys.device)
        with torch.no_grad(), self.table.lock.write():
            if ids is None:
                ids = (self.book.live if frozen else self.book.frozen).nonzero().squeeze(1)
            elif frozen:
                check_live(ids, self.book.live, "only live rows can be frozen")
            ids = ids[self.book.frozen.index_select(0, ids) != frozen]
            if len(ids):
                self._flag(ids, torch.full_like(ids, frozen, dtype=torch.bool))

    def _checked_values(self, values: Tensor | None, count: int) -> Tensor | None:
        if values is None:
            return None
        if self.values is None:
            raise ValueError("values is given, expected None: this bank's keys are its values")
        return check_table("values", values, count, self.values.shape[1], self.values)

    def _values_or_zeros(self, ids: Tensor, values: Tensor | None) -> Tensor | None:
        """`values`, or, if some of the rows are new, what is there and zeros for the new ones."""
        live = self.book.live.index_select(0, ids)
        if values is not None or self.values is None or live.all():
            return values
        return self.values.detach().index_select(0, ids).masked_fill_(~live.unsqueeze(1), 0)


def _check_place(path: str | Path | None, sync: bool) -> None:
    if not isinstance(sync, bool):
        raise TypeError(f"sync is {sync!r}, expected True or False")
    if path is not None:
        check_new_place(path)
