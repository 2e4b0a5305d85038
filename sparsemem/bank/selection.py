"""Which rows a batch of new data uses far more than the background did.

Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): only the rows that score best by
TF-IDF are trained on new data, so that what the others hold is not forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.bank.book import RowBook
from sparsemem.bank.rows import zeros

PENDING = 2**16  # ids kept as they come, at least
PIECES = 1024
SHARE = 64  # of the rows, one in so many, at most


def tf_idf(
    counts: Int[Tensor, " n"], total: int, batches: int, frequencies: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """c_i / sum_j c_j * log((B + 1) / (df_i + 1)): Lin et al. 2025, section 3.

    counts: c, accesses of each row by the batch; total: their sum over all rows; batches: B, of
    the background; frequencies: df, in how many of them the row was accessed.
    """
    rarity = (batches + 1) / (frequencies.double() + 1)
    return counts.double() / total * rarity.log()


class Tally:
    """How often each row was seen: O(1) an id.

    Ids are kept as they come. When there are many they are added up in a table of all rows, which
    is lazily zero; looking through that later costs O(SHARE) for each id that was added.
    """

    def __init__(self, num_rows: int) -> None:
        self._lock = threading.Lock()
        self._num_rows = num_rows
        self._pending: list[Tensor] = []
        self._size = 0
        self._table: Tensor | None = None

    def add(self, ids: Int[Tensor, " n"]) -> None:
        """Count ids, repeats as often; -1 is no row."""
        with self._lock:
            self._pending.append(ids)
            self._size += len(ids)
            if len(self._pending) > PIECES:  # a tensor weighs far more than an id
                self._pending = [torch.cat(self._pending)]
            if self._size > max(PENDING, self._num_rows // SHARE):
                self._add_up()

    def counts(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]] | None:
        """Distinct ids in ascending order, and how often each was seen. None: no id was."""
        with self._lock:
            if self._table is None:
                if not self._pending:
                    return None
                pending = torch.cat(self._pending)
                ids, counts = torch.unique(pending[pending >= 0], return_counts=True)
                return ids, counts
            self._add_up()
            ids = self._table.nonzero().squeeze(1)
            return ids, self._table.index_select(0, ids)

    def _add_up(self) -> None:
        if not self._pending:
            return
        ids = torch.cat(self._pending)
        if self._table is None:
            self._table = zeros(self._num_rows, dtype=torch.int64, device=ids.device)
        self._table.index_add_(0, ids.clamp(min=0), (ids >= 0).to(ids.dtype))
        self._pending, self._size = [], 0


class Selection:
    """Counts accesses of the batch and of the background, and marks the rows to be trained."""

    def __init__(self, book: RowBook) -> None:
        self._book = book
        self._batch = Tally(len(self._book.live))  # reads since the last selection
        self._background: Tally | None = None  # reads of the background batch that is open

    def accessed(self, ids: Int[Tensor, " n"]) -> None:
        """Count a read's accesses."""
        (self._background or self._batch).add(ids)

    @contextmanager
    def background(self) -> Iterator[None]:
        """Reads inside are one batch of the background; none if the block raises."""
        if self._background is not None:
            raise RuntimeError("a background batch is open already: they cannot be nested")
        tally = self._background = Tally(len(self._book.live))
        try:
            yield
        finally:
            self._background = None
        counted = tally.counts()
        if counted is not None:
            ones = torch.ones_like(counted[0], dtype=self._book.background.dtype)
            self._book.background.index_add_(0, counted[0], ones)
        self._book.batches += 1

    def select(self, top: int) -> Int[Tensor, " n"]:
        """Mark the `top` rows of the batch with the greatest scores; they, ascending.

        Ties go to rows with more accesses (without a background all scores are 0), then by id.
        Only rows that could be trained count: live and not frozen. Ends the batch.
        """
        book, counted = self._book, self._batch.counts()
        self.lift()
        ids, counts = counted or (book.last_access.new_empty(0),) * 2
        total = int(counts.sum())
        able = book.live.index_select(0, ids) & ~book.frozen.index_select(0, ids)
        ids, counts = ids[able], counts[able]
        scores = tf_idf(counts, total, int(book.batches), book.background.index_select(0, ids))
        order = counts.argsort(descending=True, stable=True)
        order = order[scores[order].argsort(descending=True, stable=True)]
        best = ids[order[:top]].sort().values
        book.selected.index_fill_(0, best, True)
        book.selection = best
        return best

    def lift(self) -> None:
        """All rows are trainable again. Ends the batch."""
        book = self._book
        if book.selection is not None:
            book.selected.index_fill_(0, book.selection, False)
        book.selection = None
        self._batch = Tally(len(self._book.live))
