"""Tables that hold no rows: what a sharded bank has in the place of a bank's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sparsemem.bank.rows import own

if TYPE_CHECKING:
    from sparsemem.bank.bank import MemoryBank


class Rowless(nn.Module):
    """`keys` and `values` as parameters of the tables' shapes, for gradients and optimisers.

    It is no part of a `state_dict` and cannot be copied, pickled, moved or cast: the rows are
    elsewhere.
    """

    keys: nn.Parameter
    values: nn.Parameter | None

    def __init__(
        self, num_rows: int, width: int, value_width: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_rows, self.width, self.value_width = num_rows, width, value_width
        self.computing_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.keys = self._rowless(width, dtype)
        self.values = None if value_width is None else self._rowless(value_width, dtype)

    @property
    def tables(self) -> list[nn.Parameter]:
        """The parameters that stand for tables."""
        return [self.keys] if self.values is None else [self.keys, self.values]

    def table_name(self, parameter: Tensor) -> str:
        """Which table a parameter stands for."""
        return "keys" if parameter is self.keys else "values"

    def _rowless(self, width: int, dtype: torch.dtype) -> nn.Parameter:
        """A parameter of a table's shape that holds one number."""
        table = nn.Parameter(torch.zeros((), dtype=dtype).expand(self.num_rows, width))
        return own(table, cast("MemoryBank", self))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Rowless:
        """Nothing is here that could be moved or cast; what leaves all as it is may be asked."""
        before = torch.empty(0, dtype=self.keys.dtype, device=self.keys.device)
        after = fn(before)
        if (after.dtype, after.device) != (before.dtype, before.device):
            raise ValueError(
                f"cannot turn {before.dtype} on {before.device} into {after.dtype} on"
                f" {after.device}: the rows of a sharded bank are in its shards; its dtype is"
                " chosen by ShardedBank.create"
            )
        return self

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing: rows are saved by `save`."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        _metadata: Any,
        _strict: bool,
        _missing: list[str],
        _unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Nothing is expected; a `MemoryBank`'s rows are refused."""
        given = sorted(key for key in state_dict if key.startswith(prefix))
        if given:
            errors.append(
                f"{given[0]} is given, but the rows of a sharded bank are in its shards: expected"
                " none; write them, or use restore()"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Refuse: a copy would be the same rows, and its changes would be numbered alike."""
        raise TypeError(
            "a sharded bank cannot be copied or pickled, as its rows are in its shards: make"
            " another ShardedBank over them"
        )
