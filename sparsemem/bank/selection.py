"""Which rows a batch of new data uses far more than the background did.

Sparse memory finetuning (Lin et al. 2025, arXiv 2510.15103): only the rows that score best by
TF-IDF are trained on new data, so that what the others hold is not forgotten.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.bank.book import RowBook
from sparsemem.bank.rows import zeros
from sparsemem.checks import check_size, nearest

POLICIES = ("tf-idf",)
NESTED = "a background batch is open already: they cannot be nested"
PENDING = 2**16  # ids kept as they come, at least
PIECES = 1024
SHARE = 64  # of the rows, one in so many, at most


def check_policy(policy: str | None, top: int | None) -> None:
    """Refuse what `select` cannot be asked for."""
    if policy is None:
        return
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, {nearest(str(policy), POLICIES)}")
    if top is None:
        raise ValueError("top is None, expected the number of rows to select")
    check_size("top", top)


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


class Candidates(NamedTuple):
    """Rows that could be selected, best first."""

    ids: Int[Tensor, " n"]
    scores: Float[Tensor, " n"]
    counts: Int[Tensor, " n"]  # accesses by the batch


def best_first(candidates: Candidates) -> Candidates:
    """By score; ties by more accesses (without a background all scores are 0), then by id."""
    ids, scores, counts = candidates
    order = ids.argsort()
    for key in (counts, scores):  # stable sorts, least key to greatest
        order = order[key[order].argsort(descending=True, stable=True)]
    return Candidates(*(part[order] for part in candidates))


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
            raise RuntimeError(NESTED)
        tally = self._background = Tally(len(self._book.live))
        try:
            yield
        finally:
            self._background = None
        self.count_background(tally)

    def count_background(self, tally: Tally) -> None:
        """One batch of the background accessed these rows."""
        counted = tally.counts()
        if counted is not None:
            ones = torch.ones_like(counted[0], dtype=self._book.background.dtype)
            self._book.background.index_add_(0, counted[0], ones)
        self._book.batches += 1

    def select(self, top: int) -> Int[Tensor, " n"]:
        """Mark the `top` rows of the batch with the greatest scores; they, ascending."""
        best = self.candidates(top).ids.sort().values
        self.mark(best)
        return best

    def counted(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Distinct rows that the batch accessed, ascending, and how often."""
        none = self._book.last_access.new_empty(0)
        return self._batch.counts() or (none, none)

    def total(self) -> int:
        """Accesses by the batch."""
        return int(self.counted()[1].sum())

    def candidates(self, top: int, total: int | None = None) -> Candidates:
        """The `top` rows of the batch that come first by `best_first`.

        Only rows that could be trained count: live and not frozen. total: accesses by the batch,
        where other shards' reads belong to it.
        """
        book, (ids, counts) = self._book, self.counted()
        total = int(counts.sum()) if total is None else total
        able = book.live.index_select(0, ids) & ~book.frozen.index_select(0, ids)
        ids, counts = ids[able], counts[able]
        scores = tf_idf(counts, total, int(book.batches), book.background.index_select(0, ids))
        return Candidates(*(part[:top] for part in best_first(Candidates(ids, scores, counts))))

    def mark(self, ids: Int[Tensor, " n"]) -> None:
        """Only these rows are trainable. Ends the batch."""
        self.lift()
        self._book.selected.index_fill_(0, ids, True)
        self._book.selection = ids

    def lift(self) -> None:
        """All rows are trainable again. Ends the batch."""
        book = self._book
        if book.selection is not None:
            book.selected.index_fill_(0, book.selection, False)
        book.selection = None
        self._batch = Tally(len(self._book.live))
