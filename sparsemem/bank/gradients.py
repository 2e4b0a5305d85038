"""Row-sparse gradients of a bank's tables: which rows have entries, and what becomes of those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparsemem.devices import is_device
from sparsemem.indexes.triton_switch import use_triton

if TYPE_CHECKING:
    from sparsemem.bank.store import RowStore

HALF_DTYPES = (torch.bfloat16, torch.float16)


def remember(ctx: Any, table: Tensor, bank: RowStore, all_found: bool) -> None:
    """What the backward pass has to know of a read of a bank's table."""
    ctx.bank, ctx.shape, ctx.dtype, ctx.time = bank, table.shape, table.dtype, bank.book.now
    ctx.all_found, ctx.table, ctx.changes = all_found, bank.table, bank.table.changes


def _all_there(ctx: Any) -> bool:
    """Whether all rows read are known to be there as they were, without a look at any of them."""
    table, book = ctx.bank.table, ctx.bank.book
    same = table is ctx.table and table.changes == ctx.changes  # no row came or went
    return ctx.all_found and same and book.last_written <= ctx.time


def sparse_gradient(ctx: Any, ids: Tensor, gradient: Tensor) -> Tensor:
    """Of a table, from that of its rows [*S, W]: an entry for each trainable row that was read.

    On a device rows that are frozen or not selected have entries too, of zeros, so that the host
    need not wait for the number of the others. It has to where rows came, went or were written.
    """
    flat, values = ids.flatten(), gradient.reshape(-1, ctx.shape[1])
    book, all_there = ctx.bank.book, _all_there(ctx)
    if not all_there or book.num_frozen or book.selection is not None:
        kept = ctx.bank.is_trainable(flat, ctx.time)
        if all_there and is_device(flat):
            values = values.masked_fill(~kept.unsqueeze(1), 0)
        elif not kept.all():
            flat, values = flat[kept], values[kept]
    if ctx.dtype in HALF_DTYPES:  # what is read several times is summed before it is rounded
        return by_row(row_sparse(flat, values, ctx.shape), ctx.dtype)
    return row_sparse(flat, values.to(ctx.dtype), ctx.shape)


def row_sparse(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """A row-sparse gradient of entries whose ids are known to be right."""
    return torch.sparse_coo_tensor(ids.unsqueeze(0), values, shape, check_invariants=False)


def by_row(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """A sparse gradient with the entries of a row added up, then in `dtype`.

    Coalesced; on a device, where the host would have to wait for the number of rows, with as many
    entries as before: a row's first one holds the sum, and the others zeros.
    """
    values = gradient._values()
    is_done = gradient.is_coalesced() or gradient.sparse_dim() != 1
    if is_done or values.dtype == torch.float64 or not use_triton(values):
        return gradient.coalesce().to(dtype)
    from sparsemem.kernels.gpu.rows import sum_by_row

    ids, sums = sum_by_row(gradient._indices()[0], values)
    return row_sparse(ids, sums.to(dtype), gradient.shape)


def without_rows(gradient: Tensor, ids: Int[Tensor, " n"]) -> Tensor:
    """A row-sparse gradient without the entries of some rows."""
    return entries(gradient, ~torch.isin(gradient._indices()[0], ids))


def entries(gradient: Tensor, kept: Bool[Tensor, " n"]) -> Tensor:
    """A row-sparse gradient of some of its entries."""
    if kept.all():
        return gradient
    return torch.sparse_coo_tensor(
        gradient._indices()[:, kept],
        gradient._values()[kept],
        gradient.shape,
        is_coalesced=gradient.is_coalesced(),
        check_invariants=False,
    )


def drop_gradients(bank: RowStore, ids: Int[Tensor, " n"]) -> None:
    """What was read there before is another row now: its gradients are not for this one."""
    for table in bank.tables:
        if table.grad is not None and table.grad.is_sparse:
            table.grad = without_rows(table.grad, ids)


def drop_blanks(bank: RowStore) -> None:
    """Before rows become trainable: on a device, gradients may have zeros for them.

    An optimiser would take those for a gradient, and move the row by its momentum.
    """
    for table in bank.tables:
        gradient = table.grad
        if gradient is not None and gradient.is_sparse and is_device(gradient):
            able = bank.is_trainable(gradient._indices()[0])
            table.grad = entries(gradient, able | gradient._values().ne(0).any(1))
