"""Product keys: the rows are all pairs of two short lists of sub-keys, searched without them.

Lample et al. 2019, Large Memory Layers with Product Keys, arXiv 1907.05242, section 3.2: where
the score of a pair is the sum of its halves' scores, the k best pairs are among the pairs of the
k best first halves with the k best second halves.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.checks import check_size
from sparsemem.indexes.base import MISSING, Found, Index, best_of
from sparsemem.indexes.exact import (
    BATCH_QUERIES,
    BLOCK_ROWS,
    SPARE,
    best_rows,
    highest,
    joined,
    product_rounding,
    rounding,
    scan,
)
from sparsemem.indexes.locks import ReadWriteLock
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.scoring import Scoring
from sparsemem.indexes.table import RowTable

DEEPER = 4  # times as many pairs are looked at when the first were not enough
MOST_ALIKE = 4096  # pairs looked at to tell scores apart that rounding may have made equal
MOST_PAIRS = 2**18  # pairs looked at for k that are not removed; beyond, all are scanned
PAIRS_AT_ONCE = 2**20


def num_subkeys(num_rows: int) -> int:
    """S, the sub-keys of each half, of a product table of `num_rows` = S * S rows."""
    root = isqrt(check_size("num_rows", num_rows))
    if root * root != num_rows:
        raise ValueError(
            f"num_rows is {num_rows}, expected a perfect square for index 'product-key', such as"
            f" {root**2} or {(root + 1) ** 2}"
        )
    return root


class ProductTable(RowTable):
    """S * S rows that are computed: row n is sub-key n // S of the first half, then n % S.

    All are live at first. Nothing of that size is stored but a mark for each that was removed,
    which is lazily zero, so that memory follows what was removed. The rows follow the sub-keys:
    those may be changed in place, under `lock.write()`, and no index needs to be told.

    Args:
        subkeys: [2, S, W/2], of any floating dtype.
        removed: [S * S] the marks of removed rows, kept and changed in place. Default: none.
    """

    def __init__(
        self, subkeys: Float[Tensor, "2 S D"], removed: Bool[Tensor, " N"] | None = None
    ) -> None:
        if subkeys.ndim != 3 or subkeys.shape[0] != 2 or not subkeys.numel():
            raise ValueError(f"subkeys has shape {tuple(subkeys.shape)}, expected [2, S, W/2]")
        if not subkeys.dtype.is_floating_point:
            raise TypeError(f"subkeys is {subkeys.dtype}, expected a floating dtype")
        self.subkeys = subkeys
        if removed is None:
            removed = _unmarked(self.num_rows, subkeys.device)
        if removed.dtype != torch.bool or tuple(removed.shape) != (self.num_rows,):
            raise ValueError(
                f"removed is {removed.dtype} {list(removed.shape)}, expected a mark for each row:"
                f" torch.bool [{self.num_rows}]"
            )
        self.removed = removed
        self.lock = ReadWriteLock()
        self.num_live = self.num_rows - int(removed.count_nonzero())
        self.extent = self.num_rows
        self.changes = 0

    @property
    def num_rows(self) -> int:
        """N = S * S."""
        return self.subkeys.shape[1] ** 2

    @property
    def width(self) -> int:
        """W, of both halves together."""
        return 2 * self.subkeys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What rows are computed with: float64 for float64 sub-keys, else float32."""
        return torch.float64 if self.subkeys.dtype == torch.float64 else torch.float32

    @property
    def live(self) -> Tensor:  # type: ignore[override]
        """Marks of all rows [N], made anew: O(N). `is_live` is O(n)."""
        return ~self.removed

    def is_live(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which of the rows are there."""
        return ~self.removed.index_select(0, ids)

    def take(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Rows, computed."""
        flat, half = ids.flatten(), self.subkeys.shape[1]
        halves = [
            self.subkeys[0].index_select(0, flat // half),
            self.subkeys[1].index_select(0, flat % half),
        ]
        return torch.cat(halves, 1).to(self.dtype).view(*ids.shape, self.width)

    def block(self, start: int, stop: int) -> tuple[Int[Tensor, " n"], Float[Tensor, "n W"]]:
        """Ids, ascending, and rows of what is live in start..stop-1."""
        ids = (~self.removed[start:stop]).nonzero().squeeze(1) + start
        return ids, self.take(ids)

    def put(self, ids: Int[Tensor, " n"], rows: Float[Tensor, "n W"]) -> None:
        """Make removed rows live again. ValueError where `rows` are not what the sub-keys give."""
        other = (rows.to(self.subkeys.dtype) != self.take(ids).to(self.subkeys.dtype)).any(1)
        if other.any():
            raise ValueError(
                f"row {int(ids[other][0])} differs from what its two sub-keys make: the rows of"
                " index 'product-key' are not stored, so they cannot be written; change `subkeys`"
            )
        self.set_live(ids, True)

    def set_live(self, ids: Int[Tensor, " n"], value: bool) -> None:
        """Mark rows as there or not. Ids are distinct."""
        if not len(ids):
            return
        before = int(self.is_live(ids).count_nonzero())
        self.removed.index_fill_(0, ids, not value)
        self.changes += 1
        self.num_live += (len(ids) if value else 0) - before


class ProductKeyIndex(Index):
    """Exact search of a `ProductTable` for `ip` and `l2`: O(S W + k log k) a query, not O(S^2 W).

    Ranks as every index does, by score and then row id. Where more than 4,096 rows score alike
    within rounding, the order in which the exact sums of their halves' scores put them decides
    which of them are found. Where most rows have been removed the search falls back on a scan.

    `update` takes rows only as the sub-keys make them, and makes removed ones live again.
    """

    takes_repeats = True

    def __init__(self, table: RowTable, metric: Metric) -> None:
        if not isinstance(table, ProductTable):
            raise TypeError(
                f"table is a {type(table).__name__}, expected a ProductTable: index 'product-key'"
                " searches sub-keys, not stored rows"
            )
        if metric is Metric.cosine:
            raise ValueError(
                "metric is 'cosine', expected 'ip' or 'l2' for index 'product-key': a cosine is"
                " not the sum of its halves' cosines"
            )
        super().__init__(table, metric)
        self.table: ProductTable = table
        self.scoring = Scoring(table.take, metric)

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Nothing to do: the sub-keys are searched as they are."""

    def removed(self, ids: Int[Tensor, " n"]) -> None:
        """Nothing to do: the marks are looked at as they are."""

    def rebuild(self) -> None:
        """Nothing to do."""

    def _search(self, queries: Tensor, k: int) -> Found:
        table, depth = self.table, min(k + SPARE, self.table.num_rows)
        scores = queries.new_full((len(queries), k), self.metric.missing)
        found = Found(scores, torch.full_like(scores, MISSING, dtype=torch.int64))
        left = torch.arange(len(queries), device=queries.device)  # queries not answered yet
        exactly = False  # a plain product will do, unless rows score alike
        # About k * N / live pairs are to be looked at, and all of them only block by block.
        while len(left) and k * table.num_rows <= MOST_PAIRS * table.num_live:
            some, complete = self._search_pairs(queries[left], k, depth, exactly)
            found.scores[left], found.ids[left] = some
            left = left[~complete]
            if depth >= MOST_PAIRS:
                break
            depth, exactly = min(DEEPER * depth, table.num_rows), True
        if len(left):
            found.scores[left], found.ids[left] = scan(table, self.metric, queries[left], k)
        return found

    def _search_pairs(
        self, queries: Tensor, k: int, depth: int, exactly: bool
    ) -> tuple[Found, Tensor]:
        """The k best live rows among the `depth` best pairs, and for which queries that is all."""
        sums, ids = self._best_pairs(queries, depth, exactly)
        ids = torch.where(self.table.is_live(ids.flatten()).view(ids.shape), ids, MISSING)
        found = self.scoring.top(queries, ids, k)
        if depth == self.table.num_rows:
            return found, torch.ones_like(ids[:, 0], dtype=torch.bool)
        complete = found.ids[:, -1] >= 0
        if depth <= MOST_ALIKE:
            complete &= self._is_below(queries, sums[:, -1], found.scores[:, -1], exactly)
        return found, complete

    def _best_pairs(self, queries: Tensor, depth: int, exactly: bool) -> Found:
        """The `depth` best pairs by the sum of their halves' scores, then id; removed or not.

        In no order, but for the last, which is the worst.
        """
        half = self.table.subkeys.shape[1]
        first, second = (
            self._best_halves(number, part, min(depth, half), exactly)
            for number, part in enumerate(queries.chunk(2, 1))
        )
        left, right = dominant_pairs(depth, half, queries.device)
        parts = []
        for start in range(0, len(queries), max(1, PAIRS_AT_ONCE // len(left))):
            some = slice(start, start + max(1, PAIRS_AT_ONCE // len(left)))
            # float64 adds what float32 would make equal.
            sums = first.scores[some].double()[:, left] + second.scores[some].double()[:, right]
            ids = first.ids[some][:, left] * half + second.ids[some][:, right]
            parts.append(unordered_best(sums, ids, depth, self.metric))
        return joined(parts)

    def _best_halves(self, number: int, queries: Tensor, count: int, exactly: bool) -> Found:
        """The best sub-keys of a half, exactly, or for `ip` as a plain product has them.

        For `l2` always exactly: squares far from the origin cancel in a product.
        """
        subkeys, dtype = self.table.subkeys[number], self.table.dtype
        if self.metric is Metric.ip and not exactly:
            keys = subkeys.to(dtype)
            batches = torch.split(queries, BATCH_QUERIES)
            return joined([best_by_product(some, keys, count) for some in batches])

        def blocks() -> Iterator[tuple[Tensor, Tensor]]:
            ids = torch.arange(len(subkeys), device=subkeys.device)
            for part in torch.split(ids, BLOCK_ROWS):
                yield part, subkeys[part[0] : part[-1] + 1].to(dtype)

        def take(ids: Tensor) -> Tensor:
            return subkeys[ids].to(dtype)

        return best_rows(Scoring(take, self.metric), queries, count, blocks)

    def _is_below(self, queries: Tensor, sums: Tensor, scores: Tensor, exactly: bool) -> Tensor:
        """Whether no pair after one with these sums can score as well as `scores`."""
        share = rounding(self.table.width, self.table.dtype)
        if not exactly:
            share += product_rounding(self.table.dtype)
        if self.metric is Metric.l2:
            slack = share * sums  # all its terms have the same sign
        else:
            slack = share * queries.double().abs().sum(1) * self.table.subkeys.abs().max()
        bound, worth = sums * self.metric.sign + slack, scores * self.metric.sign
        below = bound < worth
        # Where nothing was rounded, pairs that score the same come in the order of their ids.
        return below | ((bound <= worth) & (slack == 0)) if exactly else below


def dominant_pairs(depth: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranks (i, j) of halves whose pair can be among the `depth` best of size * size.

    (i + 1)(j + 1) - 1 pairs have halves of no worse ranks, and are no worse: about
    depth * log(depth) pairs are left.
    """
    ranks = torch.arange(min(depth, size), device=device)
    counts = (depth // (ranks + 1)).clamp(max=size)
    left = ranks.repeat_interleave(counts)
    starts = counts.cumsum(0) - counts
    return left, torch.arange(len(left), device=device) - starts[left]


def best_by_product(queries: Float[Tensor, "Q D"], keys: Float[Tensor, "S D"], count: int) -> Found:
    """The `count` greatest inner products, as a matrix product has them; equal ones in no order."""
    scores = queries.new_zeros(len(queries), len(keys))
    scores.addmm_(queries, keys.mT)  # in place: not in half precision under autocast
    return Found(*highest(scores.nan_to_num_(-torch.inf), count))


def unordered_best(
    sums: Float[Tensor, "Q C"], ids: Int[Tensor, "Q C"], count: int, metric: Metric
) -> Found:
    """The `count` best by sum, then id, as `best_of` has them, but only the last in its place."""
    worth = sums * metric.sign
    if count >= worth.shape[1]:
        return best_of(sums, ids, count, metric)
    top = worth.topk(count + 1, 1)
    found = Found(top.values[:, :count] * metric.sign, ids.gather(1, top.indices[:, :count]))
    tied = (top.values[:, count - 1] == top.values[:, count]).nonzero().squeeze(1)
    if len(tied):  # which of the equal ones belong to it
        found.scores[tied], found.ids[tied] = best_of(sums[tied], ids[tied], count, metric)
    return found


def _unmarked(count: int, device: torch.device) -> Tensor:
    """Marks [count], all False; on the CPU they take no memory before they are touched."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(count, np.bool_))
    return torch.zeros(count, dtype=torch.bool, device=device)
