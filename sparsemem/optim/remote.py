"""Tables whose rows are elsewhere: their gradients are sent there, and stepped there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.bank.bank import MemoryBank
from sparsemem.bank.rows import bank_of
from sparsemem.bank.watching import is_table
from sparsemem.optim.gradients import Change, computing_dtype


class Push(NamedTuple):
    """The gradient of one table, ahead of the step."""

    table: str  # "keys" or "values"
    ids: Int[Tensor, " n"]  # each once
    gradient: Float[Tensor, "n W"]
    since: int = 2**62  # clock time; rows written later are other rows than the gradient's

    @property
    def goes_everywhere(self) -> bool:
        """To shards, too, that own none of its rows: all have to know that it is there."""
        return True


class RowStep(NamedTuple):
    """What a step of an optimiser does to one table."""

    table: str  # "keys" or "values"
    kind: str  # the optimiser's class
    options: dict[str, Any]  # of its parameter group
    ids: Int[Tensor, " n"]  # each once
    gradient: Float[Tensor, "n W"]
    since: int = 2**62  # clock time; rows written later are other rows than the gradient's
    factor: float | None = None  # of a gradient that was pushed before; then there is none here

    @property
    def goes_everywhere(self) -> bool:
        """To shards, too, that own none of its rows: they may have what was pushed."""
        return self.factor is not None


@runtime_checkable
class RemoteBank(Protocol):
    """A bank whose tables hold no rows here."""

    num_workers: int  # whose gradients make one step together

    def table_name(self, parameter: Tensor) -> str:
        """Which of its tables a parameter stands for."""

    def step_rows(self, steps: Sequence[RowStep]) -> None:
        """Step the rows of all its tables, where they are; their state is kept there too."""

    def squared_norm(self, pushes: Sequence[Push]) -> float:
        """Of the mean of all workers' gradients of some tables, squared: alike on all workers."""

    def scale(self, tables: Sequence[str], factor: float) -> None:
        """Step those gradients by a factor."""


def bank_here(parameter: Tensor) -> MemoryBank | None:
    """The bank that a parameter belongs to, if its rows are in this process."""
    bank = bank_of(parameter)
    return bank if isinstance(bank, MemoryBank) else None


def remote_bank_of(parameter: Tensor) -> RemoteBank | None:
    """The bank whose rows a parameter stands for, where they are elsewhere; None for all others.

    Sub-keys of product keys are here, whoever has the rows.
    """
    if bank_here(parameter) is not None or not is_table(parameter):
        return None
    return cast("RemoteBank", bank_of(parameter))


def team_tables(parameters: Iterable[Tensor]) -> dict[RemoteBank, list[Tensor]]:
    """Tables whose gradients here are one worker's share of several, by bank."""
    found: dict[RemoteBank, list[Tensor]] = {}
    for parameter in parameters:
        bank = remote_bank_of(parameter)
        if bank is not None and bank.num_workers > 1:
            found.setdefault(bank, []).append(parameter)
    return found


def team_norm(bank: RemoteBank, tables: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The norm of the mean of all workers' gradients of these tables."""
    pushes = [push_of(table, bank.table_name(table)) for table in tables]
    dtype = computing_dtype(tables[0])
    return torch.tensor(math.sqrt(bank.squared_norm(pushes)), dtype=dtype)


def push_of(table: Tensor, name: str) -> Push:
    """A table's gradient; where it has none, one of no rows. TypeError for a dense one."""
    if table.grad is None:
        ids = torch.empty(0, dtype=torch.int64)
        return Push(name, ids, table.new_empty(0, table.shape[1], dtype=computing_dtype(table)))
    if not table.grad.is_sparse:
        raise TypeError(f"the gradient of {name} is dense, expected sparse: its rows are remote")
    whole = table.grad.coalesce()
    return Push(name, whole.indices()[0], whole.values().to(computing_dtype(table)))


def steps_of(changes: Sequence[Change], bank: RemoteBank, kind: str) -> list[RowStep]:
    """What the changes of a remote bank's tables are there. TypeError for a dense gradient."""
    steps = []
    for name, parameter, options, ids, gradient, _ in changes:
        if ids is None:
            raise TypeError(
                f"the gradient of {name} is dense, expected sparse: its rows are remote"
            )
        own = {key: value for key, value in options.items() if not key.startswith("param")}
        own = {key: float(v) if isinstance(v, Tensor) else v for key, v in own.items()}
        steps.append(RowStep(bank.table_name(parameter), kind, own, ids, gradient))
    return steps
