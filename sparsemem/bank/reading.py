"""What a read of a bank finds, and sums of values that are read without copying them.

Letters: Q queries, K rows read a query, H heads whose rows are summed together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemem.bank.arguments import check_bank_queries
from sparsemem.bank.contract import Bank
from sparsemem.bank.gradients import remember, sparse_gradient
from sparsemem.bank.rows import (
    gather_pairs,
    gather_scored,
)
from sparsemem.bank.store import RowStore
from sparsemem.checks import check_at_most, check_size
from sparsemem.indexes.base import Found
from sparsemem.indexes.metrics import Metric
from sparsemem.indexes.triton_switch import use_triton

if TYPE_CHECKING:
    from sparsemem.bank.bank import MemoryBank


class Hit(NamedTuple):
    """What a read found, best first; where no more rows are live: id -1, zeros, worst score."""

    rows: Float[Tensor, "*Q K W"]
    values: Float[Tensor, "*Q K V"]
    scores: Float[Tensor, "*Q K"]
    ids: Int[Tensor, "*Q K"]


class Reading(NamedTuple):
    """What is found before values are looked at."""

    rows: Float[Tensor, "Q K W"]
    scores: Float[Tensor, "Q K"]
    ids: Int[Tensor, "Q K"]
    complete: bool  # ids are known to be of live rows


def check_read(bank: MemoryBank, queries: Float[Tensor, "*Q W"], top_k: int) -> None:
    """Refuse queries that are not finite vectors of the bank's width, and k beyond its rows."""
    check_bank_queries(queries, bank.width, bank.keys.device)
    check_at_most("top_k", check_size("top_k", top_k), "num_rows", bank.num_rows)


def find(bank: MemoryBank, queries: Float[Tensor, "*Q W"], top_k: int) -> Reading:
    """The best rows and their scores, differentiable; an access. Under `table.lock.read()`."""
    queries = queries.reshape(-1, bank.width).to(bank.computing_dtype)
    with torch.no_grad():  # as the index's `search`, which would look at the queries again
        found = bank.index._search(queries.detach(), top_k)
    complete = top_k <= bank.table.num_live  # then an index finds as many, whatever it is
    bank._accessed(found.ids, complete)
    return Reading(*_scored(bank, queries, found, complete), found.ids, complete)


def _scored(
    bank: MemoryBank, queries: Tensor, found: Found, complete: bool
) -> tuple[Tensor, Tensor]:
    if bank.has_product_keys:
        return scored_pairs(bank.keys, queries, found.ids, bank.metric)
    return gather_scored(bank.keys, queries, found, bank, complete)


def scored_pairs(
    subkeys: Float[Tensor, "2 S D"],
    queries: Float[Tensor, "Q W"],
    ids: Int[Tensor, "Q K"],
    metric: Metric,
) -> tuple[Float[Tensor, "Q K W"], Float[Tensor, "Q K"]]:
    """Rows of product keys at ids and their scores, in the queries' dtype; differentiable."""
    rows = gather_pairs(subkeys, ids, queries.dtype)
    return rows, metric.scores(queries, rows).masked_fill(ids < 0, metric.missing)


def read_sum(
    bank: Bank,
    queries: Float[Tensor, "*B H W"],
    top_k: int,
    weigh: Callable[[Hit], Float[Tensor, "*B H K"]],
) -> Float[Tensor, "*B V"]:
    """sum_hk weigh(hit)_hk value_hk, in the bank's computing dtype, under autocast too.

    On a GPU values of a table of their own are not copied: `hit.values` is empty, and a backward
    pass raises RuntimeError where a row that was read has been written anew since.
    """
    table = _summed_in_place(bank)
    if table is None:
        return _product(bank.read(queries, top_k), weigh)
    (bank, values), shape = table, queries.shape[:-1]
    check_read(bank, queries, top_k)
    bank.refresh()
    bank.count_call()
    with torch.autocast(queries.device.type, enabled=False), bank.table.lock.read():
        found = find(bank, queries, top_k)
        rows, scores, ids = (part.view(*shape, *part.shape[1:]) for part in found[:3])
        weights = weigh(Hit(rows, rows[..., :0], scores, ids))
        ids, weights = (part.flatten(-2).flatten(0, -2) for part in (ids, weights))
        sums = WeighedRows.apply(values, ids, weights, bank, found.complete)  # type: ignore[no-untyped-call]
    return sums.view(*shape[:-1], values.shape[1])  # type: ignore[no-any-return]


def _product(hit: Hit, weigh: Callable[[Hit], Tensor]) -> Tensor:
    """The sum as a product of matrices."""
    with torch.autocast(hit.values.device.type, enabled=False):
        weights = weigh(hit).flatten(-2).unsqueeze(-2)
        return (weights @ hit.values.flatten(-3, -2)).squeeze(-2)


def _summed_in_place(bank: Bank) -> tuple[MemoryBank, Tensor] | None:
    """The bank and its values, where a kernel sums them as they lie."""
    if not isinstance(bank, RowStore) or bank.values is None or not use_triton(bank.values):
        return None
    if bank.computing_dtype != torch.float32 or not bank.values.is_contiguous():
        return None
    return cast("MemoryBank", bank), bank.values


class WeighedRows(torch.autograd.Function):
    """sums[q] = sum_k weights[q, k] table[ids[q, k]], without a copy of the rows."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, weights: Tensor, bank: MemoryBank, all_found: bool
    ) -> Tensor:
        """Sums [Q, V] in float32; an id of -1 counts as zeros."""
        from sparsemem.kernels.gpu.rows import weigh_rows

        # Torch refuses a backward pass after an optimiser has stepped the table.
        ctx.save_for_backward(table, ids, weights)
        remember(ctx, table, bank, all_found)
        return weigh_rows(table, ids, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """That of the table is sparse, with one entry for each trainable row that was read."""
        from sparsemem.kernels.gpu.rows import weights_gradient

        table, ids, weights = ctx.saved_tensors
        _check_unwritten(ctx, ids)
        of_weights = weights_gradient(table, ids, gradient)
        of_table = None
        if ctx.needs_input_grad[0]:
            of_rows = weights.unsqueeze(-1) * gradient.unsqueeze(-2)
            of_table = sparse_gradient(ctx, ids, of_rows)
        return of_table, None, of_weights, None, None


def _check_unwritten(ctx: Any, ids: Tensor) -> None:
    """Refuse to look at rows that are not those that were read: the host knows if none can be."""
    book = ctx.bank.book
    if book.last_written <= ctx.time:
        return
    flat = ids.flatten()
    later = (book.written.index_select(0, flat.clamp(min=0)) > ctx.time) & (flat >= 0)
    if later.any():
        row = int(flat[later][0])
        raise RuntimeError(
            f"row {row} was written between a read and its backward pass, which needs its value:"
            " expected writes before the read or after the backward pass"
        )
