"""What layers need of a bank: they take a sharded one too, which the core does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem.indexes.metrics import Metric

if TYPE_CHECKING:
    from sparsemem.bank.reading import Hit


@runtime_checkable
class Bank(Protocol):
    """Rows that are found by content and written. Methods are as `MemoryBank`'s.

    Parameters are not named: whether an object has them is not looked up alike in all Pythons.
    """

    num_rows: int
    width: int
    value_width: int | None
    metric: Metric

    def read(self, queries: Float[Tensor, "*Q W"], top_k: int) -> Hit:
        """The top_k best live rows of each query."""

    def append(
        self,
        rows: Float[Tensor, "n W"],
        values: Float[Tensor, "n V"] | None = None,
        *,
        tags: int | Int[Tensor, " n"] | None = None,
        ttl: int | None = None,
    ) -> Int[Tensor, " n"]:
        """Store new rows; returns their ids."""

    def write(
        self,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n W"] | None = None,
        values: Float[Tensor, "n V"] | None = None,
        *,
        tags: int | Int[Tensor, " n"] | None = None,
        ttl: int | None = None,
    ) -> None:
        """Overwrite rows."""

    def remove(
        self, ids: Int[Tensor, " n"] | None = None, *, tag: int | None = None
    ) -> Int[Tensor, " removed"]:
        """Take rows out."""

    def gather(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Keys at ids."""

    def tags_of(self, ids: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """Tags of rows; 0 for -1."""

    def capacity(self) -> int:
        """Rows that could give way to new ones."""

    def get_parameter(self, target: str) -> nn.Parameter:
        """As a module's: "keys", and "values" if they have a table of their own."""

    def stats(self) -> dict[str, Any]:
        """Figures to watch."""


def check_bank_contract(bank: object) -> None:
    """Refuse what is no bank."""
    if not isinstance(bank, Bank):
        raise TypeError(f"bank is a {type(bank).__name__}, expected a MemoryBank or a ShardedBank")
