"""ShardedBank: the contract of a `MemoryBank` over the rows of many shards.

Letters as in `sparsemem.bank.bank`; S shards.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsemem.bank.arguments import (
    check_bank_ids,
    check_bank_queries,
    check_table,
    check_tags,
    check_ttl,
)
from sparsemem.bank.book import NO_TAG
from sparsemem.bank.errors import write_errors
from sparsemem.bank.folder import check_new_place
from sparsemem.bank.gradients import by_row, row_sparse
from sparsemem.bank.reading import Hit
from sparsemem.bank.rows import own
from sparsemem.checks import check_at_most, check_size
from sparsemem.distributed.home import Manifest, read_manifest, write_manifest
from sparsemem.distributed.merging import assembled, chosen, merged
from sparsemem.distributed.placement import MISSING, Part, Placement
from sparsemem.distributed.shard import ShardFound
from sparsemem.distributed.transport import Arguments, Transport
from sparsemem.files import new_folder
from sparsemem.indexes.base import Found
from sparsemem.indexes.factory import EXACT, PRODUCT_KEY
from sparsemem.indexes.metrics import Metric
from sparsemem.optim.remote import RowStep


class ShardedBank(nn.Module):
    """N rows over S shards, found, written and trained as those of one `MemoryBank`.

    Row id lives on shard id % S. `keys` and `values` are parameters of the tables' shapes that
    hold no rows: their gradients are sparse, and `sparsemem.optim` sends them to the shards.

    Args:
        path: the folder of the sharded bank: see `create`.
        shards: how its shards are reached.
    """

    def __init__(self, path: str | Path, shards: Transport) -> None:
        super().__init__()
        self.path, self.shards = Path(path), shards
        manifest = self._manifest = read_manifest(self.path)
        if shards.num_shards != manifest.num_shards:
            raise ValueError(
                f"shards are {shards.num_shards}, expected {manifest.num_shards}, as in {path}"
            )
        self.placement, self.num_rows = manifest.placement, manifest.num_rows
        given = manifest.arguments
        width, value_width = given["width"], given["value_width"]
        self.width, self.value_width = width, value_width
        self.metric, dtype = Metric(given["metric"]), getattr(torch, given["dtype"])
        self.computing_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.keys = rowless(self, self.num_rows, width, dtype)
        self.values = None
        if value_width is not None:
            self.values = rowless(self, self.num_rows, value_width, dtype)
        self.clock = manifest.clock
        self.worker, self.num_workers = 0, 1  # of those whose gradients make one step together

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
        **options: Any,
    ) -> Path:
        """A new folder for a sharded bank; every shard's process has to see it.

        Args:
            path: where it is to be; nothing is there yet, or an empty folder.
            num_shards: S, at most num_rows.
            options: others of `MemoryBank`, such as min_recall.
        """
        Placement.of(num_rows, num_shards)
        if index == PRODUCT_KEY:
            raise ValueError("index is 'product-key', expected another: its rows are not written")
        arguments = {"width": width, "value_width": value_width, "index": index, "metric": metric}
        arguments |= {"dtype": str(dtype).removeprefix("torch."), **options}
        manifest = Manifest(
            bank=uuid.uuid4().hex, num_shards=num_shards, num_rows=num_rows, arguments=arguments
        )
        manifest.new_bank(0, num_rows=1).close()  # whoever gives wrong arguments is told here
        path = check_new_place(path)
        with write_errors(path), new_folder(path) as folder:
            write_manifest(folder, manifest)
        return path

    def save(self) -> None:
        """Make a version of all rows, optimisers and usage: a crash goes on from there.

        What was written since is in the shards' logs, and as safe; a save shortens them.
        """
        version = self._manifest.version + 1
        self._ask("checkpoint", (version,))
        changed = {"version": version, "clock": self.clock}
        self._manifest = self._manifest.model_copy(update=changed)
        write_manifest(self.path, self._manifest)
        self._ask("forget", (version,))

    def restore(self) -> None:
        """Go back to the last version saved, in all shards, optimisers and usage with it."""
        self._manifest = read_manifest(self.path)
        self._ask("restore", (self._manifest.version,))
        self.clock = self._manifest.clock

    def read(self, queries: Float[Tensor, "*Q W"], top_k: int) -> Hit:
        """The top_k best live rows of each query; as `MemoryBank.read`."""
        check_bank_queries(queries, self.width, self.keys.device)
        check_at_most("top_k", check_size("top_k", top_k), "num_rows", self.num_rows)
        flat = queries.reshape(-1, self.width).to(self.computing_dtype)
        time = self._tick()
        parts = self._ask("find", (flat.detach(), top_k, time))
        found = merged(self.placement, [Found(*part[:2]) for part in parts], top_k, self.metric)
        rows, values = self._fetched(parts, found.ids)
        self._mark(found.ids, time)
        with torch.autocast(self.keys.device.type, enabled=False):
            scored = (self.keys, flat, found.ids, found.scores, rows, self, time)
            rows, scores = FetchedRows.apply(*scored)  # type: ignore[no-untyped-call]
            if values is None:
                values = rows
            else:
                fetched = (self.values, found.ids, values, self, time)
                values = FetchedValues.apply(*fetched)  # type: ignore[no-untyped-call]
        shape = queries.shape[:-1]
        return Hit(*(x.view(*shape, *x.shape[1:]) for x in (rows, values, scores, found.ids)))

    forward = read

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
            if done is False:
                ids[part.places] = MISSING
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
            rows = check_table("rows", rows, len(ids), self.width, self.keys)
        values = self._checked_values(values, len(ids))
        new_tags = None if tags is None else check_tags(tags, len(ids), self.keys.device)
        check_ttl(ttl)
        parts = self.placement.split(ids)
        if rows is None:
            self._check_live(ids, parts, "expected rows to write there")
        given = {"rows": rows, "values": values, "tags": new_tags}

        def arguments(part: Part) -> Arguments:
            return ({"ttl": ttl} | {name: picked(x, part) for name, x in given.items()},)

        self._ask_owners("write_at", parts, arguments, self._tick())

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
            gone = self.shards.ask("remove_at", each)
        removed = [self.placement.ids(shard, local) for shard, local in enumerate(gone)]
        return torch.cat(removed).sort().values if ids is None else in_order(ids, removed)

    def expire(self) -> None:
        """Take out rows whose time to live is over."""
        self._ask("expire_at", (self.clock,))

    def freeze(self, ids: Int[Tensor, " n"] | None = None) -> None:
        """From now on rows take no gradient and do not give way to new ones. None: all live."""
        if ids is not None:
            check_bank_ids(ids, self.num_rows, self.keys.device)
            self._check_live(ids, self.placement.split(ids), "only live rows can be frozen")
        self._set_frozen(ids, True)

    def unfreeze(self, ids: Int[Tensor, " n"] | None = None) -> None:
        """Undo `freeze`. None: of all rows."""
        if ids is not None:
            check_bank_ids(ids, self.num_rows, self.keys.device)
        self._set_frozen(ids, False)

    def gather(self, ids: Int[Tensor, "*S"]) -> Float[Tensor, "*S W"]:
        """Keys at ids (-1: zeros); differentiable. Not an access."""
        rows = self._gathered("rows_at", ids.flatten()).view(*ids.shape, self.width)
        return FetchedValues.apply(  # type: ignore[no-untyped-call, no-any-return]
            self.keys, ids, rows, self, self.clock
        )

    def table_name(self, parameter: Tensor) -> str:
        """Which table a parameter stands for."""
        return "keys" if parameter is self.keys else "values"

    def step_rows(self, steps: Sequence[RowStep]) -> None:
        """Send an optimiser's step to the rows' owners: one call a shard."""
        each: list[list[RowStep]] = [[] for _ in range(self.placement.num_shards)]
        for step in steps:
            for mine, part in zip(each, self.placement.split(step.ids), strict=True):
                if len(part.local):
                    gradient = step.gradient[part.places]
                    mine.append(step._replace(ids=part.local, gradient=gradient))
        alone = self.num_workers == 1
        who = (self.worker, self.num_workers)
        self.shards.ask("step", [None if alone and not mine else (mine, *who) for mine in each])

    def stats(self) -> dict[str, Any]:
        """Figures to watch: sums over the shards, `clock`, and `shards`, those of each.

        recall: the lowest of all shards.
        """
        each = self._ask("stats_at", (self.clock,))
        summed = ("num_rows", "num_live", "num_frozen", "table_bytes", "bytes", "buffered")
        totals = {name: sum(stats[name] for stats in each) for name in summed}
        recall = min(stats["recall"] for stats in each)
        return {**totals, "recall": recall, "clock": self.clock, "shards": each}

    def is_trainable(self, ids: Int[Tensor, " n"], since: int | None = None) -> Bool[Tensor, " n"]:
        """Which rows take gradients, of what was read at time `since`."""
        time = self.clock if since is None else since
        parts = self.placement.split(ids)
        answers = self.shards.ask("trainable_of", [(part.local, time) for part in parts])
        result: Tensor = assembled(parts, answers, len(ids))
        return result

    def gradient(self, ctx: Any, ids: Tensor, gradient: Tensor) -> Tensor:
        """Of a table, from that of its rows [*S, W]: an entry for each trainable row read."""
        flat, values = ids.flatten(), gradient.reshape(-1, ctx.shape[1])
        kept = self.is_trainable(flat, ctx.time)
        return by_row(row_sparse(flat[kept], values[kept], ctx.shape), ctx.dtype)

    def close(self) -> None:
        """Let go of the shards."""
        self.shards.close()

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _ask(self, operation: str, arguments: Arguments) -> list[Any]:
        return self.shards.ask(operation, [arguments] * self.placement.num_shards)

    def _ask_owners(
        self, operation: str, parts: list[Part], arguments: Callable[[Part], Arguments], time: int
    ) -> list[Any]:
        """Ask those that own some of the rows."""
        each = [(part.local, *arguments(part), time) if len(part.local) else None for part in parts]
        return self.shards.ask(operation, each)

    def _gathered(self, operation: str, ids: Tensor) -> Tensor:
        parts = self.placement.split(ids)
        rows = self.shards.ask(operation, [(part.local,) for part in parts])
        return assembled(parts, rows, len(ids))

    def _mark(self, ids: Tensor, time: int) -> None:
        parts = self.placement.split(ids.flatten())
        self.shards.tell("mark", [(p.local, time) if len(p.local) else None for p in parts])

    def _fetched(self, parts: list[ShardFound], ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows and values of the rows that are left of what the shards found."""
        owner = self.placement.owner(ids)
        tables: list[Tensor] = []
        local = self.placement.local(ids)
        for name in ("rows", "values"):
            each = [getattr(part, name) for part in parts]
            if each[0] is None:
                return tables[0], None
            table = each[0].new_zeros(*ids.shape, each[0].shape[2])
            for shard, (part, rows) in enumerate(zip(parts, each, strict=True)):
                query, place = (owner == shard).nonzero(as_tuple=True)
                if len(query):
                    same = part.ids[query] == local[query, place].unsqueeze(1)
                    table[query, place] = rows[query, same.to(torch.uint8).argmax(1)]
            tables.append(table)
        return tables[0], tables[1]

    def _set_frozen(self, ids: Tensor | None, frozen: bool) -> None:
        if ids is None:
            self._ask("freeze_at", (None, frozen))
            return
        each = [(p.local, frozen) if len(p.local) else None for p in self.placement.split(ids)]
        self.shards.ask("freeze_at", each)

    def _check_live(self, ids: Tensor, parts: list[Part], what: str) -> None:
        live = assembled(parts, self.shards.ask("live_of", [(p.local,) for p in parts]), len(ids))
        if not live.all():
            raise ValueError(f"ids holds {int(ids[~live][0])}, which is not live: {what}")

    def _checked_values(self, values: Tensor | None, count: int) -> Tensor | None:
        if values is None:
            return None
        if self.values is None or self.value_width is None:
            raise ValueError("values is given, expected None: this bank's keys are its values")
        return check_table("values", values, count, self.value_width, self.values)


class NewRows(NamedTuple):
    """What `append` stores."""

    rows: Float[Tensor, "n W"]
    values: Float[Tensor, "n V"] | None
    tags: Int[Tensor, " n"]

    def at(self, places: Int[Tensor, " m"]) -> NewRows:
        """Some of them."""
        return NewRows(*(None if part is None else part[places] for part in self))  # type: ignore[arg-type]


def rowless(bank: ShardedBank, num_rows: int, width: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of a table's shape that holds one number: its rows are elsewhere."""
    return own(nn.Parameter(torch.zeros((), dtype=dtype).expand(num_rows, width)), bank)  # type: ignore[arg-type]


def picked(table: Tensor | None, part: Part) -> Tensor | None:
    """A shard's share of rows."""
    return None if table is None else table[part.places]


def in_order(ids: Tensor, removed: list[Tensor]) -> Tensor:
    """Those of `ids` that were removed, in their order."""
    return ids[torch.isin(ids, torch.cat(removed))]


class FetchedRows(torch.autograd.Function):
    """Rows and scores that shards sent, in the graph: as `sparsemem.bank.rows.ScoredRows`."""

    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        queries: Tensor,
        ids: Tensor,
        scores: Tensor,
        rows: Tensor,
        bank: ShardedBank,
        time: int,
    ) -> tuple[Tensor, Tensor]:
        """Rows [Q, K, W] and their scores [Q, K]."""
        rows, scores = rows.clone(), scores.clone()  # outputs of their own
        ctx.save_for_backward(ids, queries, rows, scores)
        ctx.bank, ctx.shape, ctx.dtype, ctx.time = bank, table.shape, table.dtype, time
        ctx.set_materialize_grads(False)
        return rows, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, by_score: Tensor | None) -> Any:
        """That of the table is sparse, with one entry for each trainable row that was read."""
        ids, queries, rows, scores = ctx.saved_tensors
        of_queries = None
        if by_score is not None:
            missing = ids < 0
            by_score, scores = (part.masked_fill(missing, 0) for part in (by_score, scores))
            of_queries, of_rows = ctx.bank.metric.gradients(queries, rows, scores, by_score)
            gradient = of_rows if gradient is None else of_rows.add_(gradient)
        if gradient is None:  # nothing depends on either
            gradient = torch.zeros_like(rows)
        return ctx.bank.gradient(ctx, ids, gradient), of_queries, None, None, None, None, None


class FetchedValues(torch.autograd.Function):
    """Rows of a table that shards sent, in the graph: as `sparsemem.bank.rows.GatherRows`."""

    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, rows: Tensor, bank: ShardedBank, time: int
    ) -> Tensor:
        """The rows."""
        ctx.save_for_backward(ids)
        ctx.bank, ctx.shape, ctx.dtype, ctx.time = bank, table.shape, table.dtype, time
        return rows.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """A sparse COO tensor with one entry for each trainable row that was read."""
        (ids,) = ctx.saved_tensors
        return ctx.bank.gradient(ctx, ids, gradient), None, None, None, None
