"""ShardedBank: the contract of a `MemoryBank` over the rows of many shards.

Letters as in `sparsemem.bank.bank`; S shards.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparsemem.bank.arguments import (
    check_bank_ids,
    check_bank_queries,
    check_dtype,
    check_table,
    check_tags,
    check_ttl,
)
from sparsemem.bank.book import NO_TAG
from sparsemem.bank.errors import write_errors
from sparsemem.bank.folder import check_new_place
from sparsemem.bank.reading import Hit
from sparsemem.bank.selection import NESTED, Candidates, best_first, check_policy
from sparsemem.bank.tables import INITIAL
from sparsemem.checks import check_at_most, check_known, check_size
from sparsemem.distributed.asking import Arguments
from sparsemem.distributed.fetched import FetchedRows, FetchedTable, Moment
from sparsemem.distributed.home import Manifest, lay_out
from sparsemem.distributed.merging import Fetched, NewRows, assembled, chosen, in_order
from sparsemem.distributed.placement import MISSING, Part, Placement
from sparsemem.distributed.subkeys import check_product, of_values
from sparsemem.distributed.transport import Transport
from sparsemem.distributed.versions import Versioned
from sparsemem.files import new_folder
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY

OwnKind = TypeVar("OwnKind", bound="ShardedBank")


class ShardedBank(Versioned):
    """N rows over S shards, found, written and trained as those of one `MemoryBank`.

    Row id lives on shard id % S. `keys` and `values` are parameters of the tables' shapes that
    hold no rows: their gradients are sparse, and `sparsemem.optim` sends them to the shards.

    Any number of processes may have one over the same shards, each with a transport of its own; it
    is for one thread at a time (another takes `as_worker(0, of=1)`). Those that train together are
    workers: an optimiser's step happens once all have pushed theirs, with the mean of their
    gradients, as DistributedDataParallel has it; who has stepped reads on once it has happened, or
    goes ahead of it by `staleness`.

    Args:
        path: the folder of the sharded bank: see `create`.
        shards: how its shards are reached.
        worker: which of the workers this is.
        num_workers: whose gradients make one step together.
        wire_dtype: torch.float16 halves what rows and gradients take on the wire; both are then
            rounded to it. None: as the tables and the computing dtype have them.
        staleness: reads may miss the updates of so many of the last steps of this worker, at most
            15, so that neither they nor the steps wait for those. 0: a read sees all of them.
            docs/sharding.md says what that gives up.
    """

    has_product_keys = False

    def __init__(
        self,
        path: str | Path,
        shards: Transport,
        *,
        worker: int = 0,
        num_workers: int = 1,
        wire_dtype: torch.dtype | None = None,
        staleness: int = 0,
    ) -> None:
        super().__init__(Path(path), shards, worker, num_workers, wire_dtype, staleness)
        if self._manifest.index == PRODUCT_KEY and not self.has_product_keys:
            raise ValueError(
                f"{path} is indexed by product keys, expected ShardedProductKeys(path, shards), of"
                " sparsemem.distributed.product_keys"
            )

    @staticmethod
    def create(
        path: str | Path,
        num_rows: int,
        width: int,
        value_width: int | None = None,
        *,
        num_shards: int,
        index: str = EXACT,
        metric: str = "cosine",
        dtype: torch.dtype = torch.float32,
        sync: bool = False,
        **options: Any,
    ) -> Path:
        """A new folder for a sharded bank; every shard's process has to see it.

        Args:
            path: where it is to be; nothing is there yet, or an empty folder.
            num_shards: S, at most num_rows.
            index: of each shard, over its rows; with as many lists as one bank would have. A folder
                with "product-key" is opened by `ShardedProductKeys(path, shards)`.
            sync: wait for the disk at each change, so that it outlives a machine without power.
            options: others of `MemoryBank`, such as min_recall.
        """
        Placement.of(num_rows, num_shards)
        for name in sorted(options.keys() & {"device", "path", "storage"}):
            raise ValueError(f"{name} is given, expected none: a shard's rows are in its memory")
        sizes: dict[str, Any] = {"num_shards": num_shards, "num_rows": num_rows}
        check_known("initial", options.get("initial", "empty"), INITIAL)
        check_size("seed", options.get("seed", 0), 0)
        arguments = {"width": width, "value_width": value_width, "index": index, "metric": metric}
        arguments |= {"dtype": str(check_dtype(dtype)).removeprefix("torch."), **options}
        if index == PRODUCT_KEY:
            check_product(num_rows, arguments)
            arguments, sizes["product_width"] = of_values(arguments), width
        manifest = Manifest(bank=uuid.uuid4().hex, sync=sync, arguments=arguments, **sizes)
        manifest.new_bank(0, num_rows=1).close()  # whoever gives wrong arguments is told here
        path = check_new_place(path)
        with write_errors(path), new_folder(path) as folder:
            lay_out(folder, manifest, manifest.drawn()[0])
        return path

    def as_worker(self: OwnKind, worker: int, of: int) -> OwnKind:
        """The same shards for one of several workers, which trains on its share of each batch.

        With tables (so gradients and an optimiser) of its own: for a thread. A process makes its
        own `ShardedBank(path, shards, worker=..., num_workers=...)`.
        """
        options: dict[str, Any] = {"wire_dtype": self.wire_dtype, "staleness": self.staleness}
        shards = self.shards.another()
        return type(self)(self.path, shards, worker=worker, num_workers=of, **options)

    def read(self, queries: Float[Tensor, "*Q W"], top_k: int) -> Hit:
        """The top_k best live rows of each query; as `MemoryBank.read`, from here or a GPU."""
        on_gpu = isinstance(queries, Tensor) and queries.is_cuda
        here = self.keys.device
        check_bank_queries(queries, self.width, queries.device if on_gpu else here)
        check_at_most("top_k", check_size("top_k", top_k), "num_rows", self.num_rows)
        flat = queries.reshape(-1, self.width).to(here, self.computing_dtype)
        fetched, moment = self._fetched(flat.detach(), top_k)
        with torch.autocast(self.keys.device.type, enabled=False):
            hit = self._in_graph(flat, fetched, moment)
        shape = queries.shape[:-1]
        return Hit(*(x.view(*shape, *x.shape[1:]).to(queries.device) for x in hit))

    forward = read

    def _in_graph(self, queries: Tensor, fetched: Fetched, moment: Moment) -> Hit:
        """What was fetched for queries [Q, W], differentiable."""
        scored = (self.keys, queries, fetched, self, moment)
        rows, scores = FetchedRows.apply(*scored)  # type: ignore[no-untyped-call]
        values = rows
        if fetched.values is not None:
            own = (self.values, fetched.ids, (fetched.values,), self, moment)
            values = FetchedTable.apply(*own)  # type: ignore[no-untyped-call]
        return Hit(rows, values, scores, fetched.ids)

    def append(
        self,
        rows: Float[Tensor, "n W"],
        values: Float[Tensor, "n V"] | None = None,
        *,
        tags: int | Int[Tensor, " n"] | None = None,
        ttl: int | None = None,
    ) -> Int[Tensor, " n"]:
        """Store new rows; returns their ids. As `MemoryBank.append`."""
        rows = check_table("rows", rows, None, self.width, self.keys)
        values = self._checked_values(values, len(rows))
        new_tags = check_tags(NO_TAG if tags is None else tags, len(rows), self.keys.device)
        new = NewRows(rows, values, new_tags)
        ids = torch.full((len(rows),), MISSING)
        places = torch.arange(len(rows))
        time = 0
        while not time or len(places):  # again, where others took rows in between
            ids[places], time = self._appended(new.at(places), check_ttl(ttl), time)
            places = places[ids[places] == MISSING]
        return ids

    def _appended(self, new: NewRows, ttl: int, time: int) -> tuple[Tensor, int]:
        """Ids of the new rows (-1 where somebody else took the row), and the call's time."""
        count = len(new.rows)
        offers = self._ask("offer", (count, time or self.clock + 1))
        limit = sum(able for _, able in offers)
        check_at_most("len(rows)", count, "num_rows - frozen rows", limit)
        time = time or self._tick()
        ids, last_access = chosen(self.placement, [offer for offer, _ in offers], count)
        parts = self.placement.split(ids)

        def arguments(part: Part) -> Arguments:
            return (*new.at(part.places), ttl, last_access[part.places])

        answers = self._ask_owners("take", parts, arguments, time)
        for part, done in zip(parts, answers, strict=True):
            if done == 0:
                ids[part.places] = MISSING
        self._wrote(ids, answers)
        return ids, time

    def write(
        self,
        ids: Int[Tensor, " n"],
        rows: Float[Tensor, "n W"] | None = None,
        values: Float[Tensor, "n V"] | None = None,
        *,
        tags: int | Int[Tensor, " n"] | None = None,
        ttl: int | None = None,
    ) -> None:
        """Overwrite rows; as `MemoryBank.write`."""
        check_bank_ids(ids, self.num_rows, self.keys.device)
        if rows is None and values is None and tags is None and ttl is None:
            raise ValueError("nothing to write, expected rows, values, tags or ttl")
        if rows is not None:
            rows = self._checked_rows(rows, len(ids))
        values = self._checked_values(values, len(ids))
        new_tags = None if tags is None else check_tags(tags, len(ids), self.keys.device)
        check_ttl(ttl)
        tables = self._tables_to_write(ids, rows, values)
        given = {**tables, "tags": new_tags}

        def arguments(part: Part) -> Arguments:
            return ({"ttl": ttl} | {name: share(x, part) for name, x in given.items()},)

        parts = self.placement.split(ids)
        clocks = self._ask_owners("write_at", parts, arguments, self._tick())
        is_anew = any(table is not None for table in tables.values())
        self._wrote(ids if is_anew else ids[:0], clocks)

    def _tables_to_write(
        self, ids: Tensor, rows: Tensor | None, values: Tensor | None
    ) -> dict[str, Tensor | None]:
        """What the shards' tables are to hold at ids; None: what they do."""
        if rows is None:
            self._check_live(ids, "expected rows to write there")
        return {"rows": rows, "values": values}

    def remove(
        self, ids: Int[Tensor, " n"] | None = None, *, tag: int | None = None
    ) -> Int[Tensor, " removed"]:
        """Take rows out, by id or all those of a tag; as `MemoryBank.remove`."""
        if (ids is None) == (tag is None):
            raise ValueError(f"ids is {ids} and tag is {tag}, expected one of them")
        if tag is not None:
            check_size("tag", tag, 1)
            gone = self._ask("remove_at", (None, tag, self.clock))
        else:
            assert ids is not None
            check_bank_ids(ids, self.num_rows, self.keys.device)
            parts = self.placement.split(ids)
            each = [(part.local, None, self.clock) for part in parts]
            self._settle()
            gone = self.shards.ask("remove_at", each)
        lists = [self.placement.ids(shard, local) for shard, local in enumerate(gone)]
        removed = torch.cat(lists).sort().values if ids is None else in_order(ids, lists)
        self._wrote(removed)
        return removed

    def expire(self) -> None:
        """Take out rows whose time to live is over."""
        self._ask("expire_at", (self.clock,))

    def freeze(self, ids: Int[Tensor, " n"] | None = None) -> None:
        """From now on rows take no gradient and do not give way to new ones. None: all live."""
        if ids is not None:
            check_bank_ids(ids, self.num_rows, self.keys.device)
            self._check_live(ids, "only live rows can be frozen")
        self._set_frozen(ids, True)

    def unfreeze(self, ids: Int[Tensor, " n"] | None = None) -> None:
        """Undo `freeze`. None: of all rows."""
        if ids is not None:
            check_bank_ids(ids, self.num_rows, self.keys.device)
        self._set_frozen(ids, False)

    @contextmanager
    def background(self) -> Iterator[None]:
        """What is read in the `with` block is one batch of the background for `select`."""
        if self._batch:
            raise RuntimeError(NESTED)
        batch = self._batch = uuid.uuid4().hex
        counts = False
        try:
            yield
            counts = True
        finally:
            self._batch = ""
            self._ask("end_background", (batch, counts))

    def select(
        self, policy: str | None = "tf-idf", top: int | None = None
    ) -> Int[Tensor, " n"] | None:
        """Train only the rows that new data uses far more than the background did.

        As `MemoryBank.select`, of what all clients read.
        """
        check_policy(policy, top)
        self._known.changed()
        if policy is None:
            self._ask("select_rows", (None,))
            return None
        total = sum(self._ask("total_accesses", ()))
        found = [Candidates(*answer) for answer in self._ask("candidates", (top, total))]
        ids = torch.cat([self.placement.ids(shard, part.ids) for shard, part in enumerate(found)])
        rest = (torch.cat(column) for column in list(zip(*found, strict=True))[1:])
        best = best_first(Candidates(ids, *rest)).ids[:top].sort().values
        parts = self.placement.split(best)
        self.shards.ask("select_rows", [(part.local,) for part in parts])
        return best

    def gather(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Keys at ids (-1: zeros); differentiable. Not an access."""
        rows = self._heard("rows_at", ids.flatten()).view(*ids.shape, self.width)
        return FetchedTable.apply(  # type: ignore[no-untyped-call, no-any-return]
            self.keys, ids, (rows,), self, self._known.moment._replace(is_whole=False)
        )

    def capacity(self) -> int:
        """Rows that could give way to new ones: all that are not frozen."""
        return int(sum(self._ask("capacity", ())))

    def tags_of(self, ids: Int[Tensor, "*S"]) -> Int[Tensor, "*S"]:
        """Tags of rows; 0 where there is none, or where the id is -1."""
        parts = self.placement.split(ids.flatten())
        return assembled(parts, self._ask_parts("tags_at", parts), ids.numel()).view(ids.shape)

    def stats(self) -> dict[str, Any]:
        """Figures to watch: sums over the shards, `clock`, and `shards`, those of each.

        recall: the lowest of all shards; None while one has not measured its own.
        """
        each = self._ask("stats_at", (self.clock,))
        summed = ("num_rows", "num_live", "num_frozen", "table_bytes", "bytes", "buffered")
        totals = {name: sum(stats[name] for stats in each) for name in summed}
        recalls = [stats["recall"] for stats in each]
        recall = None if None in recalls else min(recalls)
        self._hear(stats["clock"] for stats in each)
        return {**totals, "recall": recall, "clock": self.clock, "shards": each}

    def is_trainable(self, ids: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Which rows take gradients: live, not frozen, and selected if there is a selection."""
        none = [None] * self.placement.num_shards
        return self._heard("trainable_of", ids, none)

    def still_trainable(self, ids: Int[Tensor, " n"], moment: Moment) -> Bool[Tensor, " n"]:
        """Which rows take gradients of what was read at a moment, now that it is held."""
        self._factors.clear()  # what was pushed is not all of the gradient any more
        if self._known.is_as_at(moment):  # then all rows that were found do
            kept = ids >= 0
        else:
            kept = self._heard("trainable_of", ids, moment.clocks)
        self._known.holds(first=all(table.grad is None for table in self.tables))
        return kept

    def close(self) -> None:
        """Let go of the shards; steps that are under way are waited for."""
        try:
            if self.shards.under_way:
                self.shards.settle()
        finally:
            self.shards.close()

    def _set_frozen(self, ids: Tensor | None, frozen: bool) -> None:
        self._known.changed()
        if ids is None:
            self._ask("freeze_at", (None, frozen))
            return
        self._settle()
        each = [(p.local, frozen) if len(p.local) else None for p in self.placement.split(ids)]
        self.shards.ask("freeze_at", each)

    def _check_live(self, ids: Tensor, what: str) -> None:
        live = self._live(ids)
        if not live.all():
            raise ValueError(f"ids holds {int(ids[~live][0])}, which is not live: {what}")

    def _checked_rows(self, rows: Tensor, count: int) -> Tensor:
        return check_table("rows", rows, count, self.width, self.keys)

    def _checked_values(self, values: Tensor | None, count: int) -> Tensor | None:
        if values is None:
            return None
        if self.values is None or self.value_width is None:
            raise ValueError("values is given, expected None: this bank's keys are its values")
        return check_table("values", values, count, self.value_width, self.values)


def share(table: Tensor | None, part: Part) -> Tensor | None:
    """A shard's share of rows."""
    return None if table is None else table[part.places]
