"""The backward pass over a memory that is changed in place.

Rows are not part of the autograd graph. A token tensor handed from operation to operation
forces the order of the backward pass, and one gradient buffer over the touched rows runs
backward beside it: a read adds into it, a write takes its rows' gradients out of it, and at
an erased row the gradient stops (Rae et al. 2016, section 3.4; the rows that were read are
saved where the paper undoes its writes).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from sparsemem.memory.store import EpisodeStore


NO_PASS = -1


class Tape:
    """The operations recorded between two detaches, and their gradient buffer.

    Operation 0 is the first that a gradient flows through: a pass that reaches it is over.
    """

    def __init__(self, store: EpisodeStore, start: Tensor | None = None) -> None:
        self.store = store
        # Rows touched before have their history elsewhere, or none: [B].
        self.start = store.touched if start is None else start
        self.length = 0
        self._pass = NO_PASS  # the backward pass that the buffer belongs to
        self._buffer: Tensor | None = None  # [B, capacity, W]
        self._dirty: list[Tensor] = []  # ids [B, n] whose rows of the buffer were added to
        self._pending: dict[int, list[tuple[Tensor, Tensor]]] = {}  # from forks, by operation

    def record(self) -> int:
        """Number of the next operation."""
        self.length += 1
        return self.length - 1

    def enter(self, operation: int) -> Tensor:
        """The gradient with respect to the rows after `operation`, at the start of its backward."""
        self._begin_pass()
        if self._buffer is None:
            self._buffer = self.store.take_buffer()
        for ids, gradient in self._pending.pop(operation, []):
            self.add(ids, gradient)
        return self._buffer

    def add(self, ids: Tensor, gradient: Tensor) -> None:
        """Add gradient [B, n, W] to rows ids [B, n] (with repetitions)."""
        assert self._buffer is not None, "called after enter"
        flat = flatten_ids(ids, self._buffer.shape[1])
        self._buffer.view(-1, gradient.shape[-1]).index_add_(0, flat, gradient.flatten(0, 1))
        self.added(ids)

    def added(self, ids: Tensor) -> None:
        """Note that rows ids [B, ...] of the buffer were added to."""
        self._dirty.append(ids.flatten(1))

    def add_later(self, operation: int, ids: Tensor, gradient: Tensor) -> None:
        """Add to the gradient with respect to the rows after `operation`, before it is entered."""
        self._begin_pass()
        self._pending.setdefault(operation, []).append((ids, gradient))

    def leave(self, operation: int) -> None:
        """After the first operation's backward: give the buffer back, all zero."""
        if operation == 0:
            self._clear()

    def _begin_pass(self) -> None:
        # Nothing of an unfinished pass (towards a late input only, or failed) may leak into this.
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._clear()
            self._pending = {}
            self._pass = current

    def _clear(self) -> None:
        if self._buffer is None:
            return
        table = self._buffer.view(-1, self._buffer.shape[-1])
        if self._dirty:
            ids = torch.cat(self._dirty, 1)
            table.index_fill_(0, flatten_ids(ids, self._buffer.shape[1]), 0)
        self.store.give_buffer(self._buffer)
        self._buffer, self._dirty = None, []

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradient of the rows: ids [B, n] (-1 instead of a repetition), values [B, n, W]."""
        assert self._buffer is not None, "called after enter"
        ids = torch.cat(self._dirty, 1).sort(1).values
        values = take_rows(self._buffer, ids)
        ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], -1)
        return ids, values

    @property
    def has_gradients(self) -> bool:
        """Whether anything was added to the buffer."""
        return bool(self._dirty)


def flatten_ids(ids: Tensor, capacity: int) -> Tensor:
    """Positions in a flattened [B * capacity] table of ids [B, ...]."""
    offset = torch.arange(0, len(ids) * capacity, capacity, device=ids.device)
    return (ids.flatten(1) + offset.unsqueeze(1)).flatten()


def take_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Rows ids [B, ...] of a table [B, capacity, W]: [B, ..., W]."""
    flat = flatten_ids(ids, table.shape[1])
    return table.view(-1, table.shape[-1]).index_select(0, flat).view(*ids.shape, -1)


class ReadRows(torch.autograd.Function):
    """rows = M[ids]; backward: the buffer's rows gain the gradient."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, ids: Tensor, tape: Tape) -> tuple[Tensor, Tensor]:
        """Rows [B, H, S, W] at ids [B, H, S], and the token."""
        ctx.tape, ctx.operation = tape, tape.record()
        ctx.save_for_backward(ids)
        return take_rows(tape.store.rows, ids), token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows_gradient: Tensor, token_gradient: Tensor) -> Any:
        """Add to the buffer."""
        (ids,) = ctx.saved_tensors
        ctx.tape.enter(ctx.operation)
        ctx.tape.add(ids.flatten(1), rows_gradient.flatten(1, -2))
        ctx.tape.leave(ctx.operation)
        return torch.zeros_like(token_gradient), None, None


class WriteRows(torch.autograd.Function):
    """M[erase] = 0, then M += sum_h weights_h words_h^T at ids_h (Rae et al. 2016, eq. 3 and 5)."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        weights: Tensor,
        words: Tensor,
        ids: Tensor,
        erase: Tensor,
        tape: Tape,
    ) -> Tensor:
        """Change the rows; the token."""
        ctx.tape, ctx.operation = tape, tape.record()
        ctx.save_for_backward(weights, words, ids, erase)
        tape.store.write(ids, weights, words, erase)
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token_gradient: Tensor) -> Any:
        """Take the gradients of weights and words out of the buffer; erased rows' end here."""
        weights, words, ids, erase = ctx.saved_tensors
        buffer = ctx.tape.enter(ctx.operation)
        gradient = take_rows(buffer, ids)
        weights_gradient = (gradient * words.unsqueeze(2)).sum(-1)
        words_gradient = (gradient * weights.unsqueeze(-1)).sum(2)
        flat = flatten_ids(erase, buffer.shape[1])
        buffer.view(-1, buffer.shape[-1]).index_fill_(0, flat, 0)
        ctx.tape.leave(ctx.operation)
        return torch.zeros_like(token_gradient), weights_gradient, words_gradient, None, None, None


class Fork(torch.autograd.Function):
    """First operation of a forked episode: hands what is left of its gradient to its parent."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tape: Tape, parent: Tape, operation: int) -> Tensor:
        """The token."""
        ctx.tape, ctx.operation = tape, tape.record()
        ctx.parent, ctx.parent_operation = parent, operation
        # Rows that the fork touches later have no history in the parent, nor a place there.
        ctx.touched = tape.start
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token_gradient: Tensor) -> Any:
        """Give the parent what is left in the buffer."""
        ctx.tape.enter(ctx.operation)
        if ctx.tape.has_gradients:
            ids, values = ctx.tape.gradients()
            dropped = (ids < 0) | (ids >= ctx.touched.unsqueeze(1))
            values.masked_fill_(dropped.unsqueeze(2), 0)
            ctx.parent.add_later(ctx.parent_operation, ids.masked_fill(dropped, 0), values)
        ctx.tape.leave(ctx.operation)
        return torch.zeros_like(token_gradient), None, None, None


class BaseRows(torch.autograd.Function):
    """First operation over a bank: hands what is left of the rows' gradient to the bank.

    What the buffer holds for a row that was copied from the bank after the tape began is the
    gradient of the copy, whenever it was made: no earlier operation has to do with the row.
    """

    @staticmethod
    def forward(ctx: Any, token: Tensor, bank_rows: Tensor, tape: Tape) -> Tensor:
        """The token."""
        ctx.tape, ctx.operation = tape, tape.record()
        return token.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token_gradient: Tensor) -> Any:
        """The bank's row-sparse gradient."""
        tape = ctx.tape
        buffer = tape.enter(ctx.operation)
        ids, values = tape.start.new_empty(len(buffer), 0), buffer[:, :0]
        if tape.has_gradients:
            ids, values = tape.gradients()
        earlier = ids < tape.start.unsqueeze(1)
        gradient = tape.store.base_gradient(ids.masked_fill(earlier, -1), values)
        tape.leave(ctx.operation)
        return torch.zeros_like(token_gradient), gradient, None
