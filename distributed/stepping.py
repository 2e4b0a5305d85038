"""An optimiser's steps of rows that are elsewhere, and the norm of their gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import monotonic, sleep
from typing import TypeVar

from torch import Tensor

from sparsemem.checks import check_finite
from sparsemem.distributed.client import SETTLE_SECONDS, Client
from sparsemem.distributed.errors import ShardError
from sparsemem.optim.remote import Push, RowStep

OfRows = TypeVar("OfRows", Push, RowStep)


class Stepping(Client):
    """A client that trains rows."""

    def step_rows(self, steps: Sequence[RowStep]) -> None:
        """Send an optimiser's step to the rows' owners: one call a shard.

        Gradients that they have already, by `squared_norm`, are not sent again.
        """
        self._settle(self.staleness)
        each = self._shares([self._ready(step) for step in steps])
        alone = self.num_workers == 1
        who = (self.worker, self.num_workers)
        send = self.shards.begin if self.staleness else self.shards.ask
        send("step", [None if alone and not mine else (mine, *who) for mine in each])
        self._known.stepped()
        for step in steps:
            self._factors.pop(step.table, None)
        self._behind += not alone

    def squared_norm(self, pushes: Sequence[Push]) -> float:
        """Of the mean of all workers' gradients of these tables, squared; the same on each worker.

        All workers ask for it, and wait for one another. The gradients go to the rows' owners and
        stay there for the step; until that, or the next read or backward pass, nothing is sent
        again.
        """
        new = [push for push in pushes if push.table not in self._factors]
        norms: list[dict[str, float] | None] = [None]
        if new:
            self._settle(self.staleness)
            ready = [push._replace(gradient=self._to_send(push)) for push in new]
            who = (self.worker, self.num_workers)
            norms = self.shards.ask("push", [(mine, *who) for mine in self._shares(ready)])
            self._factors |= {push.table: 1.0 for push in new}
        total, all_norms = 0.0, self._all_norms(norms)
        for push in pushes:
            own = sum(norm[push.table] for norm in all_norms)
            if not math.isfinite(own):  # then the step is refused, by all workers alike
                self._factors[push.table] = math.nan
            total += own * self._factors[push.table] ** 2
        return total

    def scale(self, tables: Sequence[str], factor: float) -> None:
        """What `squared_norm` has left with the owners is stepped by this factor."""
        for table in tables:
            self._factors[table] *= factor

    def _all_norms(self, norms: list[dict[str, float] | None]) -> list[dict[str, float]]:
        """Each shard's squared norms, once all workers have pushed."""
        deadline = monotonic() + self.shards.timeout
        while True:
            found = [norm for norm in norms if norm is not None]
            if len(found) == self.placement.num_shards:
                return found
            if monotonic() > deadline:
                raise ShardError(
                    f"worker {self.worker} has pushed its gradients, and the others of"
                    f" {self.num_workers} have not within {self.shards.timeout:g} seconds"
                )
            sleep(SETTLE_SECONDS)
            norms = self.shards.ask("squared_norms", self._each((self.worker,)))

    def _ready(self, step: RowStep) -> RowStep:
        """A step as it is sent: with its gradient, or with the factor of the one that was."""
        factor = self._factors.get(step.table)
        if factor is None:
            return step._replace(gradient=self._to_send(step))
        if not math.isfinite(factor):
            raise ValueError(
                f"the gradient of {step.table}, or the factor that it was clipped by, is not"
                " finite; nothing was stepped"
            )
        return step._replace(ids=step.ids[:0], gradient=step.gradient[:0], factor=factor)

    def _shares(self, parts: Sequence[OfRows]) -> list[list[OfRows]]:
        """Of each shard, what concerns its rows, with the time when it was known to be valid."""
        valid = self._known.valid
        each: list[list[OfRows]] = [[] for _ in range(self.placement.num_shards)]
        for part in parts:
            for shard, own in enumerate(self.placement.split(part.ids)):
                if len(own.local) or part.goes_everywhere:
                    gradient = part.gradient[own.places]
                    mine = part._replace(ids=own.local, gradient=gradient, since=valid[shard])
                    each[shard].append(mine)
        return each

    def _to_send(self, part: Push | RowStep) -> Tensor:
        """A gradient as it goes over the wire; ValueError where that cannot hold it."""
        gradient = part.gradient / self.num_workers if self.num_workers > 1 else part.gradient
        if self.wire_dtype is None:
            return gradient
        narrow = gradient.to(self.wire_dtype)
        check_finite(f"the gradient of {part.table} in {self.wire_dtype}", narrow)
        return narrow
