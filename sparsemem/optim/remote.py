"""Tables whose rows are elsewhere: their gradients are sent there, and stepped there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from sparsemem.optim.gradients import Change


class RowStep(NamedTuple):
    """What a step of an optimiser does to one table."""

    table: str  # "keys" or "values"
    kind: str  # the optimiser's class
    options: dict[str, Any]  # of its parameter group
    ids: Int[Tensor, " n"]  # each once
    gradient: Float[Tensor, "n W"]
    since: int = 2**62  # clock time; rows written later are other rows than the gradient's


@runtime_checkable
class RemoteBank(Protocol):
    """A bank whose tables hold no rows here."""

    def table_name(self, parameter: Tensor) -> str:
        """Which of its tables a parameter stands for."""

    def step_rows(self, steps: Sequence[RowStep]) -> None:
        """Step the rows of all its tables, where they are; their state is kept there too."""


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
