"""Tells banks of the rows that any torch optimiser has stepped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sparsemem.bank.gradients import without_rows
from sparsemem.bank.rows import bank_of

if TYPE_CHECKING:
    from sparsemem.bank.bank import MemoryBank

# Those of torch's optimisers that take sparse gradients and leave all other rows alone.
_BY_ROW = (SGD, SparseAdam, Adagrad)


@functools.cache
def watch_optimisers() -> None:
    """From now on, look at every optimiser's steps in this process.

    An optimiser that tells banks itself, under their locks, says so by `tells_banks = True`.
    The others change rows without the lock: let no other thread search meanwhile.
    """
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def is_table(parameter: Tensor) -> bool:
    """Whether a parameter of a bank has a row for each of its ids (product keys have not)."""
    bank = bank_of(parameter)
    if bank is None or parameter.ndim != 2:
        return False
    return any(parameter is table for table in bank.tables)


def tell(parameter: Tensor, ids: Int[Tensor, " n"]) -> None:
    """Tell a bank that distinct rows of one of its tables moved, under `table.lock.write()`."""
    bank = bank_of(parameter)
    if bank is None:
        return
    if parameter is bank.keys:
        bank.changed(ids)
    elif bank.journal is not None:
        bank.journal.touched(ids, parameter)


def moved_rows(optimiser: Optimizer, table: Tensor) -> Int[Tensor, " n"]:
    """The distinct rows that an optimiser's last step may have moved.

    Those of the gradient, and of SGD's momentum, which is sparse too and moves rows that have
    no gradient any more. All rows, where that does not explain what the optimiser does.
    """
    gradient = table.grad
    if gradient is None or not gradient.is_sparse or not isinstance(optimiser, _BY_ROW):
        return torch.arange(len(table), device=table.device)
    kept = optimiser.state.get(table, {}).values()
    sparse = [gradient, *(value for value in kept if _is_sparse(value))]
    ids: Tensor = torch.unique(torch.cat([value._indices()[0] for value in sparse]))
    return ids


def _is_sparse(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_sparse


def _tables(optimiser: Optimizer) -> Iterator[tuple[Tensor, MemoryBank]]:
    """The banks' tables among the parameters of an optimiser that does not tell banks itself."""
    if getattr(optimiser, "tells_banks", False):
        return
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            # The first look is the cheap one: most parameters are no bank's.
            if "memory_bank" not in parameter.__dict__:
                continue
            bank = bank_of(parameter)
            if bank is not None and parameter.stride() == (0, 0):
                raise TypeError(
                    f"{type(optimiser).__name__} cannot step the rows of a sharded bank, which are"
                    " elsewhere: use an optimiser of sparsemem.optim"
                )
            if bank is not None and is_table(parameter):
                yield parameter, bank


def _leave_out_still(optimiser: Optimizer, table: Tensor, bank: MemoryBank) -> None:
    """Take rows that are not to move out of the gradient and out of SGD's momentum.

    Rows that were frozen, not selected or removed since the backward pass, and in the momentum
    rows that were written anew since the last step: they are other rows now. What is frozen later
    begins without momentum when it is released. O(entries), as the step itself.
    """
    if table.grad is not None and table.grad.is_sparse:
        table.grad = _trainable(table.grad, bank, None)
    state = optimiser.state.get(table, {})
    for name, value in list(state.items()):
        if _is_sparse(value):
            state[name] = _trainable(value, bank, getattr(value, "bank_time", None))


def _trainable(values: Tensor, bank: MemoryBank, since: int | None) -> Tensor:
    """A row-sparse tensor without the entries of rows that are not trainable."""
    ids = values._indices()[0]
    return without_rows(values, ids[~bank.is_trainable(ids, since)])


def _before_step(optimiser: Optimizer, _args: Any, _kwargs: Any) -> None:
    for parameter, bank in _tables(optimiser):  # gradients may come in the step, from a closure
        with bank.table.lock.write():
            bank.expect_change()
            if isinstance(optimiser, _BY_ROW):
                _leave_out_still(optimiser, parameter, bank)


def _after_step(optimiser: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Tell each bank among the optimiser's parameters which of its rows were moved, and when."""
    for parameter, bank in _tables(optimiser):
        if parameter.grad is not None:
            with bank.table.lock.write():
                tell(parameter, moved_rows(optimiser, parameter))
                for value in optimiser.state.get(parameter, {}).values():
                    if _is_sparse(value):
                        value.bank_time = bank.book.now
