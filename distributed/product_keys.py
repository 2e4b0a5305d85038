"""ShardedProductKeys: product keys over shards, which hold the values.

Letters as in `sparsemem.distributed.bank`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsemem.bank.bank import WHOLE
from sparsemem.bank.reading import Hit, scored_pairs
from sparsemem.bank.rows import gather_pairs, own
from sparsemem.distributed.bank import ShardedBank
from sparsemem.distributed.fetched import FetchedTable, Moment
from sparsemem.distributed.home import read_manifest
from sparsemem.distributed.merging import Fetched
from sparsemem.distributed.shard import ShardFound
from sparsemem.distributed.subkeys import keep_subkeys, write_subkeys
from sparsemem.distributed.transport import Transport
from sparsemem.indexes.base import Found
from sparsemem.indexes.product_key import ProductKeyIndex, ProductTable

if TYPE_CHECKING:
    from sparsemem.bank import MemoryBank


class ShardedProductKeys(ShardedBank):
    """N = S^2 rows, all pairs of two lists of sub-keys, with their values over shards.

    As a `MemoryBank` with index="product-key". `keys` are the sub-keys [2, S, W/2]: a dense
    parameter, which every client has and searches itself; of several workers each averages its
    gradient with the others', as of any dense parameter. `values` stand for the shards' rows. A
    version of the bank holds both.

    Args:
        path: a folder that `ShardedBank.create(..., index="product-key")` has made. The sub-keys
            are those of the version in force; values are as the shards have them: they go on from
            what they have answered. `restore()` takes both back.
        shards, options: as for `ShardedBank`.
    """

    has_product_keys = True
    values: nn.Parameter

    def __init__(self, path: str | Path, shards: Transport, **options: Any) -> None:
        super().__init__(path, shards, **options)
        width = self._manifest.product_width
        if width is None:
            raise ValueError(f"{path} has no product keys, expected ShardedBank(path, shards)")
        self.values, self.value_width = self.keys, self.width
        subkeys = nn.Parameter(self._manifest.subkeys(self.path))
        self.keys, self.width = own(subkeys, cast("MemoryBank", self)), width
        self._index = self._index_without(None)
        self._seen: tuple[int, ...] = ()  # `changes` of the shards when it was looked who is live

    @property
    def tables(self) -> list[nn.Parameter]:
        """The parameter that stands for the shards' rows."""
        return [self.values]

    def table_name(self, parameter: Tensor) -> str:
        """What the shards call their rows."""
        return "keys"

    def as_worker(self, worker: int, of: int) -> ShardedProductKeys:
        """As `ShardedBank.as_worker`; with a copy of the sub-keys as they are."""
        other = super().as_worker(worker, of)
        with torch.no_grad():
            other.keys.copy_(self.keys)
        return other

    def gather(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Keys at ids (-1: zeros); differentiable. Not an access."""
        return gather_pairs(self.keys, ids, self.computing_dtype)

    def append(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse, as a `MemoryBank` does: all rows are there."""
        raise ValueError(f"append is not for product keys: {WHOLE}")

    def save(
        self, alongside: Callable[[int], object] | None = None, keep: Collection[int] = ()
    ) -> None:
        """As `ShardedBank.save`, with the sub-keys."""

        def write(version: int) -> None:
            write_subkeys(self.path, version, self.keys)
            if alongside is not None:
                alongside(version)

        super().save(write, keep)
        keep_subkeys(self.path, self.versions)

    def restore(self, version: int | None = None) -> None:
        """As `ShardedBank.restore`, with the sub-keys."""
        subkeys = read_manifest(self.path).at(version).subkeys(self.path)
        super().restore(version)
        with torch.no_grad():
            self.keys.copy_(subkeys)

    def _find(self, queries: Tensor, top_k: int) -> Found:
        """By the sub-keys; the shards are told of the call, and say whether rows came or went."""
        nothing = queries.new_empty(0, self.values.shape[1])
        told: list[ShardFound] = self._ask("find", (nothing, 1, self._tick()))
        self._know(part.standing for part in told)
        self._follow()
        with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
            return self._index._search(queries, top_k)

    def _in_graph(self, queries: Tensor, fetched: Fetched, moment: Moment) -> Hit:
        """What was fetched for queries [Q, W], differentiable."""
        rows, scores = scored_pairs(self.keys, queries, fetched.ids, self.metric)
        own = (self.values, fetched.ids, (fetched.rows,), self, moment)
        values = FetchedTable.apply(*own)  # type: ignore[no-untyped-call]
        return Hit(rows, values, scores, fetched.ids)

    def _follow(self) -> None:
        """Know which rows are live: O(N) where some are not and anything has changed since."""
        changes = self._known.moment.changes
        if changes == self._seen:
            return
        counts = [stats["num_live"] for stats in self._ask("stats_at", (self.clock,))]
        if sum(counts) < self.num_rows:
            self._index = self._index_without(~self._live(torch.arange(self.num_rows)))
        elif self._index.table.num_live < self.num_rows:
            self._index = self._index_without(None)
        self._seen = changes

    def _index_without(self, removed: Tensor | None) -> ProductKeyIndex:
        """The search of all pairs but those that are not there (None: all are)."""
        return ProductKeyIndex(ProductTable(self.keys.data, removed), self.metric)

    def _tables_to_write(
        self, ids: Tensor, rows: Tensor | None, values: Tensor | None
    ) -> dict[str, Tensor | None]:
        """The shards' rows are the values: zeros, where rows come back without."""
        if values is None:
            self.expire()  # as the write will
            live = self._live(ids)
            if not live.all():
                there = self._heard("rows_at", ids).masked_fill(~live.unsqueeze(1), 0)
                values = there.to(self.values.dtype)
        return {"rows": values, "values": None}

    def _checked_rows(self, rows: Tensor, count: int) -> NoReturn:
        raise ValueError(f"rows is given, expected None with product keys: {WHOLE}")
