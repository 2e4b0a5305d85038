"""Rows that shards sent, in the graph of autograd; and what a client knows of its shards.

Shape letters: S shards, Q queries, K rows a query, W width, n rows of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemem.bank.gradients import HALF_DTYPES, by_row, row_sparse
from sparsemem.bank.rows import through_scores
from sparsemem.distributed.merging import Fetched

if TYPE_CHECKING:
    from sparsemem.distributed.bank import ShardedBank


class Moment(NamedTuple):
    """What was known of the shards when something was read."""

    clocks: tuple[int, ...]
    changes: tuple[int, ...]
    own: int  # changes that the client itself had asked for
    is_whole: bool  # all live rows were trainable, and only such rows are looked at


class Known:
    """What a client knows of its shards, from their answers.

    Clocks are Lamport's: whoever hears of a later time goes on from there. Two clients' times say
    nothing of each other; but on one shard, what was written later has the later time.
    """

    def __init__(self, num_shards: int) -> None:
        self.clocks, self._changes = [0] * num_shards, [0] * num_shards
        self._own, self._partly = 0, [False] * num_shards
        # When the gradients that wait for a step were known to be of the rows as they are.
        self._valid: list[int] | None = None

    def heard(self, shard: int, clock: int, changes: int, partly: bool) -> None:
        """A shard's `Standing`, as its answer to a question has it."""
        self._partly[shard] = partly
        self.clocks[shard] = max(clock, self.clocks[shard])
        self._changes[shard] = changes

    def changed(self, clocks: Sequence[int | None] = ()) -> None:
        """The client itself has changed rows; at these times, where they were written.

        It has dropped the gradients that it held of those rows, and so knows that what it still
        holds is valid at that time.
        """
        self._own += 1
        for shard, clock in enumerate(clocks):
            if clock is not None:
                self.clocks[shard] = max(clock, self.clocks[shard])
                if self._valid is not None:
                    self._valid[shard] = max(clock, self._valid[shard])

    @property
    def moment(self) -> Moment:
        """Now."""
        whole = not any(self._partly)
        return Moment(tuple(self.clocks), tuple(self._changes), self._own, whole)

    def is_as_at(self, moment: Moment) -> bool:
        """Whether, as far as is known, rows seen then all are as they were, and trainable."""
        return (
            moment.is_whole and moment.own == self._own and moment.changes == tuple(self._changes)
        )

    def holds(self, first: bool) -> None:
        """A gradient that is valid now is held until the next step. first: no other one is."""
        if first or self._valid is None:  # else it is as old as the oldest
            self._valid = list(self.clocks)

    @property
    def valid(self) -> list[int]:
        """Times at which the gradients that are held were valid."""
        return list(self.clocks if self._valid is None else self._valid)

    def stepped(self) -> None:
        """No gradient is held from now on."""
        self._valid = None


class FetchedRows(torch.autograd.Function):
    """Rows and scores that shards sent, in the graph: as `sparsemem.bank.rows.ScoredRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Float[Tensor, "N W"],
        queries: Float[Tensor, "Q W"],
        fetched: Fetched,
        bank: ShardedBank,
        moment: Moment,
    ) -> tuple[Tensor, Tensor]:
        """Rows and their scores."""
        ids, scores, rows = fetched.ids, fetched.scores, fetched.rows
        ctx.save_for_backward(ids, queries, rows, scores)
        remember(ctx, table, bank, moment)
        ctx.set_materialize_grads(False)
        return rows, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, by_score: Tensor | None) -> Any:
        """That of the table is sparse, with one entry for each trainable row that was read."""
        ids, queries, rows, scores = ctx.saved_tensors
        of_queries = of_table = None
        if by_score is not None:
            saved = (queries, rows, scores, ids)
            of_queries, gradient = through_scores(ctx.bank.metric, *saved, by_score, gradient)
        if ctx.needs_input_grad[0]:  # of zeros, where nothing depends on either
            of_table = sparse(ctx, ids, torch.zeros_like(rows) if gradient is None else gradient)
        return of_table, of_queries, None, None, None


class FetchedTable(torch.autograd.Function):
    """Rows of a table that shards sent, in the graph: as `sparsemem.bank.rows.GatherRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Float[Tensor, "N W"],
        ids: Int[Tensor, "*S"],
        rows: tuple[Float[Tensor, "*S W"]],
        bank: ShardedBank,
        moment: Moment,
    ) -> Tensor:
        """The rows, which are in a tuple as they are no input of the graph."""
        ctx.save_for_backward(ids)
        remember(ctx, table, bank, moment)
        return rows[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """A sparse COO tensor with one entry for each trainable row that was read."""
        (ids,) = ctx.saved_tensors
        return sparse(ctx, ids, gradient), None, None, None, None


def remember(ctx: Any, table: Tensor, bank: ShardedBank, moment: Moment) -> None:
    """What the backward pass has to know of a read."""
    ctx.bank, ctx.shape, ctx.dtype, ctx.moment = bank, table.shape, table.dtype, moment


def sparse(ctx: Any, ids: Tensor, gradient: Tensor) -> Tensor:
    """Of a table, from that of its rows [*S, W]: as `sparsemem.bank.gradients.sparse_gradient`."""
    flat, values = ids.flatten(), gradient.reshape(-1, ctx.shape[1])
    kept = ctx.bank.still_trainable(flat, ctx.moment)
    if not kept.all():
        flat, values = flat[kept], values[kept]
    if ctx.dtype in HALF_DTYPES:  # what is read several times is summed before it is rounded
        return by_row(row_sparse(flat, values, ctx.shape), ctx.dtype)
    return row_sparse(flat, values.to(ctx.dtype), ctx.shape)
