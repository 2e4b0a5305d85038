"""A client of shards: how a sharded bank asks them, and keeps up with them.

Letters: S shards, n rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch
from torch import Tensor

from sparsemem.bank.gradients import without_rows
from sparsemem.checks import check_at_most, check_size
from sparsemem.distributed.asking import Arguments
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.fetched import Known, Moment
from sparsemem.distributed.home import read_manifest
from sparsemem.distributed.merging import Fetched, assembled, merged
from sparsemem.distributed.placement import Part
from sparsemem.distributed.rowless import Rowless
from sparsemem.distributed.server import KEPT_ANSWERS
from sparsemem.distributed.shard import Counted, ShardFound, Standing
from sparsemem.distributed.traffic import COUNTED
from sparsemem.distributed.transport import Transport
from sparsemem.indexes.base import Found
from sparsemem.indexes.factory import EXACT
from sparsemem.indexes.metrics import Metric

# What a bank with staleness asks while steps of its own are under way.
READS = ("find", "rows_at", "trainable_of")
MOST_STALE = KEPT_ANSWERS - 1
SETTLE_SECONDS = 0.0005  # between looks at whether a step has happened


class Client(Rowless):
    """One of those that use a sharded bank, with a clock that follows all of them."""

    def __init__(
        self,
        path: Path,
        shards: Transport,
        worker: int,
        num_workers: int,
        wire_dtype: torch.dtype | None,
        staleness: int,
    ) -> None:
        check_size("num_workers", num_workers)
        check_at_most("worker", check_size("worker", worker, 0), "num_workers - 1", num_workers - 1)
        if wire_dtype not in (None, torch.float16):
            raise ValueError(f"wire_dtype is {wire_dtype}, expected torch.float16 or None")
        check_at_most("staleness", check_size("staleness", staleness, 0), "the most", MOST_STALE)
        manifest = read_manifest(path)
        if shards.num_shards != manifest.num_shards:
            raise ValueError(
                f"shards are {shards.num_shards}, expected {manifest.num_shards}, as in {path}"
            )
        given = manifest.arguments
        widths = given["width"], given["value_width"]
        super().__init__(manifest.num_rows, *widths, getattr(torch, given["dtype"]))
        self.path, self.shards, self._manifest = path, shards, manifest
        self.placement, self.metric = manifest.placement, Metric(given["metric"])
        self.worker, self.num_workers, self.wire_dtype = worker, num_workers, wire_dtype
        self.staleness = staleness
        self._batch = ""  # of the background, that is open
        self._known = Known(manifest.num_shards)
        self._reads = 0
        self._behind = 0  # own steps, at most, that wait for other workers
        self._factors: dict[str, float] = {}  # by table: its gradient is with the owners
        self.clock: int = max(clock for _, clock in self._ask("standing", ()))

    def extra_repr(self) -> str:
        """What a module prints of itself."""
        widths = str(self.width) if self.values is None else f"{self.width}, {self.value_width}"
        kind = f"index={self._manifest.index!r}, metric={str(self.metric)!r}"
        return f"{self.num_rows}, {widths}, {kind}, num_shards={self.placement.num_shards}"

    def _settle(self, behind: int = 0) -> None:
        """Wait until all of this worker's steps have happened, but for the last `behind`.

        ShardError where other workers do not send theirs for as long as a shard may take to answer.
        """
        self._hear_begun(behind)
        deadline = monotonic() + self.shards.timeout
        while self._behind > behind:
            waiting = max(self.shards.ask("waiting", self._each((self.worker,))))
            self._behind = waiting + self.shards.under_way
            if self._behind > behind and monotonic() > deadline:
                raise ShardError(
                    f"worker {self.worker} has stepped, and the others of {self.num_workers} have"
                    f" not within {self.shards.timeout:g} seconds"
                )
            if self._behind > behind:
                sleep(SETTLE_SECONDS)
                self._hear_begun(behind)

    def _hear_begun(self, behind: int) -> None:
        if self.shards.under_way:  # a change that was cut short stays open: see `Asking.ask`
            self.shards.settle(behind)

    def _settle_for(self, operation: str) -> None:
        self._settle(self.staleness if operation in READS else 0)

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _hear(self, clocks: Iterable[int]) -> None:
        """Shards have got further: so this client's clock does."""
        self.clock = max(self.clock, *clocks)

    def _each(self, arguments: Arguments) -> list[Arguments]:
        return [arguments] * self.placement.num_shards

    def _ask(self, operation: str, arguments: Arguments) -> list[Any]:
        self._settle_for(operation)
        return self.shards.ask(operation, self._each(arguments))

    def _ask_parts(self, operation: str, parts: Sequence[Part], *more: Sequence[Any]) -> list[Any]:
        """Ask all shards about rows of theirs. more: further arguments, one a shard."""
        self._settle_for(operation)
        each = zip((part.local for part in parts), *more, strict=True)
        return self.shards.ask(operation, list(each))

    def _ask_owners(
        self, operation: str, parts: list[Part], arguments: Callable[[Part], Arguments], time: int
    ) -> list[Any]:
        """Ask those that own some of the rows."""
        self._settle()
        each = [(part.local, *arguments(part), time) if len(part.local) else None for part in parts]
        return self.shards.ask(operation, each)

    def _heard(self, operation: str, ids: Tensor, *more: Sequence[Any]) -> Tensor:
        """What the shards answer for each row, with their standing."""
        parts = self.placement.split(ids)
        answers = self._ask_parts(operation, parts, *more)
        self._know(standing for _, standing in answers)
        return assembled(parts, [answer for answer, _ in answers], len(ids))

    def _live(self, ids: Tensor) -> Tensor:
        parts = self.placement.split(ids)
        return assembled(parts, self._ask_parts("live_of", parts), len(ids))

    def _know(self, standings: Iterable[Standing]) -> None:
        for shard, standing in enumerate(standings):
            self._known.heard(shard, *standing)
        self._hear(self._known.clocks)

    def _wrote(self, ids: Tensor, clocks: Sequence[int | None] = ()) -> None:
        """Rows are other rows now: their gradients are not for these."""
        for table in self.tables:
            if len(ids) and table.grad is not None and table.grad.is_sparse:
                table.grad = without_rows(table.grad, ids)
        self._known.changed(clocks)
        self._hear(self._known.clocks)

    def _counted(self, queries: Tensor, found: Found) -> Counted | None:
        """Some of a read's queries, for the shards to measure their share of the recall."""
        if self._manifest.arguments["index"] == EXACT:
            return None
        step = -(-len(queries) // COUNTED) or 1
        some = slice(self._reads % step, None, step)  # wandering, so that no place is preferred
        self._reads += 1
        return Counted(queries[some], found.ids.shape[1], found.scores[some, -1])

    def _find(self, queries: Tensor, top_k: int) -> Found:
        """Ids and scores of the best rows of all shards, by one call of the usage clock."""
        parts: list[ShardFound] = self._ask("find", (queries, top_k, self._tick()))
        self._know(part.standing for part in parts)
        return merged(self.placement, [Found(*part[:2]) for part in parts], top_k, self.metric)

    def _fetched(self, queries: Tensor, top_k: int) -> tuple[Fetched, Moment]:
        """The best rows of all shards, an access of each; and what was known when they were found.

        First scores and ids, of which every shard sends K a query, then only the rows that are
        left. What another client changes between the two is seen as it is then.
        """
        self._factors.clear()  # what was pushed belongs to a step that was not made
        found = self._find(queries, top_k)
        owners = self.placement.split(found.ids.flatten())
        more = self.clock, self._batch, bool(self.wire_dtype), self._counted(queries, found)
        each = [(part.local, *more) if len(part.local) else None for part in owners]
        sent = self.shards.ask("fetch", each)
        shape, tables = found.ids.shape, []
        for number, table in enumerate(self.tables):
            rows = found.scores.new_zeros(*shape, table.shape[1])
            for part, own in zip(owners, sent, strict=True):
                if own is not None:
                    rows.view(-1, table.shape[1]).index_copy_(
                        0, part.places, own[number].to(rows.dtype)
                    )
            tables.append(rows)
        rows, values = tables if len(tables) > 1 else (tables[0], None)
        return Fetched(found.scores, found.ids, rows, values), self._known.moment
