"""Exact search: a scan of all live rows, in blocks, on any device. `device_scan` is a GPU's own.

A matrix product scores rows fast, but its sums differ from the rows' own scores
(`Scoring`) by rounding, and so does its order. Therefore it only sorts out: it gives each
row an upper bound of its score, by the standard bound of a sum's rounding error (Higham 2002,
Accuracy and Stability of Numerical Algorithms, section 3.1: |fl(x.y) - x.y| <= n u |x||y|). The
rows with the best bounds are scored themselves; where the next bound does not fall short of the
k-th best score found, the query is scanned again row by row. So the result is exact, ties
included, and the second scan rare.

Below, *worth* is a score in the direction in which more is better: the negative distance for l2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.indexes.base import Found, Index, best_of
from sparsemem.indexes.device_scan import device_scan, fits
from sparsemem.indexes.metrics import COSINE_EPSILON, Metric, inverse_norm
from sparsemem.indexes.scoring import Scoring
from sparsemem.indexes.table import RowTable
from sparsemem.indexes.triton_switch import use_triton

BLOCK_ROWS = 16_384  # rows scanned at once
BATCH_QUERIES = 256  # queries scanned at once: the bounds of a block take 16 MiB
SPARE = 8  # rows beyond k that are scored themselves
SPAN = 8  # neighbouring rows of which only the best is compared at first

# Makes the blocks of a scan: ids, ascending over all blocks (but see `best_rows`), and rows.
Blocks = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class ExactIndex(Index):
    """Scans every live row: O(N) a search, nothing to maintain.

    A row whose score is not a number ranks last, with the worst score.
    """

    takes_repeats = True

    def __init__(self, table: RowTable, metric: Metric) -> None:
        super().__init__(table, metric)
        self.scoring = Scoring(table.take, metric)

    def _search(self, queries: Tensor, k: int) -> Found:
        return scan(self.table, self.metric, queries, k, self.scoring)

    def changed(self, ids: Int[Tensor, " n"]) -> None:
        """Nothing to do: a scan sees the rows as they are."""

    def removed(self, ids: Int[Tensor, " n"]) -> None:
        """Nothing to do: a scan sees the marks as they are."""

    def rebuild(self) -> None:
        """Nothing to do."""


def scan(
    table: RowTable,
    metric: Metric,
    queries: Float[Tensor, "Q W"],
    k: int,
    scoring: Scoring | None = None,
) -> Found:
    """The k best of all live rows, exactly: by score, then id. Queries are of `table.dtype`.

    On a GPU by `device_scan`, where that fits.
    """
    if use_triton(queries) and fits(table, k):
        return device_scan(table, metric, queries, k)

    def blocks() -> Iterable[tuple[Tensor, Tensor]]:
        for start in range(0, table.extent, BLOCK_ROWS):
            yield table.block(start, min(start + BLOCK_ROWS, table.extent))

    return best_rows(scoring or Scoring(table.take, metric), queries, k, blocks)


def best_rows(
    scoring: Scoring,
    queries: Float[Tensor, "Q W"],
    k: int,
    blocks: Blocks,
    ordered: Blocks | None = None,
) -> Found:
    """The k best of the rows in `blocks`, exactly.

    Where the ids of `blocks` do not ascend, `ordered` makes the same rows in order.
    """
    if not len(queries):
        scores = queries.new_empty(0, k)
        return Found(scores, torch.empty(0, k, dtype=torch.int64, device=queries.device))
    metric, parts = scoring.metric, []
    for some in torch.split(queries, BATCH_QUERIES):
        ids, beyond = by_product(metric, some, k + SPARE, blocks)
        found = scoring.top(some, ids, k)
        floor = found.scores[:, -1] * metric.sign
        unsure = ((beyond >= floor) & (beyond > -torch.inf)).nonzero().squeeze(1)
        if len(unsure):
            again = row_by_row(scoring, some[unsure], k, ordered or blocks, floor[unsure])
            found.scores[unsure], found.ids[unsure] = again
        parts.append(found)
    return joined(parts)


def by_product(
    metric: Metric, queries: Float[Tensor, "Q W"], keep: int, blocks: Blocks
) -> tuple[Int[Tensor, "Q C"], Float[Tensor, " Q"]]:
    """The rows with the best upper bounds, `keep` or all; and a bound of all other rows' worth."""
    bounds = queries.new_empty(len(queries), 0)
    ids = torch.empty(bounds.shape, dtype=torch.int64, device=queries.device)
    beyond = queries.new_full((len(queries),), -torch.inf)
    for block_ids, rows in blocks():
        if not len(rows):
            continue
        values, places = highest(upper_bounds(metric, queries, rows), keep)
        first = not bounds.shape[1]
        bounds, ids = torch.cat([bounds, values], 1), torch.cat([ids, block_ids[places]], 1)
        if first and values.shape[1] == keep < len(rows):
            beyond = values[:, -1]  # `highest` has sorted them
        elif values.shape[1] < len(rows) or bounds.shape[1] > keep:
            bounds, places = bounds.topk(keep, 1)
            ids, beyond = ids.gather(1, places), bounds[:, -1]
    return ids, beyond


def row_by_row(
    scoring: Scoring,
    queries: Float[Tensor, "Q W"],
    k: int,
    blocks: Blocks,
    floor: Float[Tensor, " Q"],
) -> Found:
    """The k best rows for queries whose k-th best is known to be worth `floor` or more.

    The slow and simple way, but for passing over blocks whose bounds are all below the floor.
    (Fewer than k where rows are removed meanwhile, by a caller that does not hold the lock.)
    """
    metric, none = scoring.metric, torch.empty(0, dtype=torch.int64, device=queries.device)
    best = [(queries.new_empty(0), none)] * len(queries)
    for block_ids, rows in blocks():
        if not len(rows):
            continue
        highest_bound = upper_bounds(metric, queries, rows).amax(1)
        for query in (highest_bound >= floor).nonzero().squeeze(1).tolist():
            scores = scoring.each(queries[query], rows)
            worth = (scores * metric.sign).nan_to_num(-torch.inf, torch.inf, -torch.inf)
            worth = torch.cat([best[query][0], worth])
            ids = torch.cat([best[query][1], block_ids])
            places = first_best(worth.unsqueeze(0), k).squeeze(0)
            best[query] = worth[places], ids[places]
    parts = [best_of(worth[None] * metric.sign, ids[None], k, metric) for worth, ids in best]
    return joined(parts)


def first_best(worth: Float[Tensor, "Q C"], k: int) -> Int[Tensor, "Q K"]:
    """Places of the k highest (or all), in order; among equal ones the first come first."""
    k = min(k, worth.shape[1])
    if not k:
        return torch.empty(len(worth), 0, dtype=torch.int64, device=worth.device)
    last = worth.topk(k, 1).values[:, -1:]
    above, equal = worth > last, worth == last
    room = k - above.sum(1, keepdim=True)
    kept = above | (equal & (equal.cumsum(1) <= room))
    places = kept.nonzero()[:, 1].view(-1, k)
    order = worth.gather(1, places).argsort(dim=1, descending=True, stable=True)
    return places.gather(1, order)


def highest(values: Float[Tensor, "Q C"], keep: int) -> tuple[Tensor, Tensor]:
    """`topk`, which finds among the spans that hold the highest values: a pass instead of a sort.

    Which of equal values are taken is left open.
    """
    count, columns = values.shape
    spans = columns // SPAN
    if spans <= 2 * keep:
        top = values.topk(min(keep, columns), 1)
        return top.values, top.indices
    # Span number s is made of the columns s, s + spans, s + 2 spans, ...
    spanned = values[:, : spans * SPAN].view(count, SPAN, spans)
    best = spanned.amax(1).topk(keep, 1).indices.unsqueeze(1)
    step = torch.arange(SPAN, device=values.device).view(1, SPAN, 1) * spans
    rest = torch.arange(spans * SPAN, columns, device=values.device).expand(count, -1)
    places = torch.cat([(best + step).flatten(1), rest], 1)
    top = values.gather(1, places).topk(keep, 1)
    return top.values, places.gather(1, top.indices)


def joined(parts: Sequence[Found]) -> Found:
    """What was found for some queries after another, as one."""
    return Found(
        torch.cat([part.scores for part in parts]), torch.cat([part.ids for part in parts])
    )


def upper_bounds(
    metric: Metric, queries: Float[Tensor, "Q W"], rows: Float[Tensor, "C W"]
) -> Float[Tensor, "Q C"]:
    """Bounds that the worth of no row exceeds, however its score was rounded.

    Q, C >= 1. Infinite for all where a product might overflow or is not a number.
    """
    bounds, certain = likely_bounds(metric, queries, rows)
    return bounds if certain else torch.full_like(bounds, torch.inf)


def likely_bounds(
    metric: Metric, queries: Float[Tensor, "Q W"], rows: Float[Tensor, "C W"]
) -> tuple[Float[Tensor, "Q C"], Bool[Tensor, ""]]:
    """`upper_bounds`, and whether no product can have overflowed: else they mean nothing."""
    slack = rounding(rows.shape[1], rows.dtype) + product_rounding(rows.dtype)
    if metric is Metric.l2:  # distances are the same from anywhere, but squares far away cancel
        center = rows.mean(0)
        queries, rows = queries - center, rows - center
    if metric is Metric.cosine:
        queries = queries * inverse_norm(queries).unsqueeze(1)
    query_squares, squares = square_norms(queries), square_norms(rows)
    certain = query_squares.max() + squares.max() < torch.finfo(rows.dtype).max / 4
    if metric is Metric.l2:
        # Less the floors of `square_norms` and as much again: these bounds must not sink by them.
        query_squares = query_squares - 4 * underflow(rows)
        least = torch.add(query_squares.unsqueeze(1), squares).mul_(slack - 1)
        return least.addmm_(queries, rows.mT, alpha=2), certain
    bounds = torch.outer(slack * query_squares.sqrt(), squares.sqrt())
    bounds.addmm_(queries, rows.mT)
    if metric is Metric.cosine:
        bounds.mul_((squares + COSINE_EPSILON).rsqrt())
    return bounds, certain


def square_norms(rows: Float[Tensor, "n W"]) -> Float[Tensor, " n"]:
    """|row|^2, plus a floor for what may be lost to underflow in it and in products."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)  # needs no copy of the squares
    return norms.square() + underflow(rows)


def underflow(rows: Float[Tensor, "n W"]) -> float:
    """So much that its product with `rounding` exceeds what W products can lose to underflow."""
    kind = torch.finfo(rows.dtype)
    return rows.shape[1] * kind.tiny / kind.eps


def rounding(width: int, dtype: torch.dtype) -> float:
    """Twice what two sums of `width` products can differ by, as a share of |q||m|."""
    return 2 * (width + 16) * torch.finfo(dtype).eps


def product_rounding(dtype: torch.dtype) -> float:
    """What matrix products lose beside, where torch may round their factors to fewer bits."""
    if dtype != torch.float32:
        return 0.0
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for single backends: not known here
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-9, "medium": 2.0**-6}[precision]
