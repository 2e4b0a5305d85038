"""What workers have sent to one shard of steps that wait for the others.

A worker either sends a step with its gradients, or pushes its gradients first, to hear the norm of
the mean of all workers', and then a step that says by which factor they are stepped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsemem.bank.gradients import row_sparse
from sparsemem.distributed.shard import ShardBank
from sparsemem.optim.remote import Push, RowStep


class Pushes:
    """Gradients and steps of the workers, each kept until all workers' are there."""

    def __init__(self, bank: ShardBank) -> None:
        self._bank = bank
        self._gradients: dict[int, dict[str, Push]] = {}  # by worker and table, to be stepped
        self._asking: dict[int, list[str]] = {}  # workers that wait for norms, and of which tables
        self._norms: dict[str, float] = {}  # by table, squared; the last that all had pushed for
        self._steps: dict[int, list[list[RowStep]]] = {}  # by worker, in the order of its steps

    def push(
        self, pushes: Sequence[Push], worker: int, num_workers: int
    ) -> dict[str, float] | None:
        """Keep a worker's gradients; what `squared_norms` answers it then.

        Each is its share of the mean: its own divided by the number of workers. Those of a table
        take the place of what it pushed before and has not stepped.
        """
        self._gradients.setdefault(worker, {}).update({push.table: push for push in pushes})
        self._asking[worker] = [push.table for push in pushes]
        if len(self._asking) == num_workers:
            tables = {table for asked in self._asking.values() for table in asked}
            self._norms.update({table: self._squared_norm(table) for table in sorted(tables)})
            self._asking.clear()
        return self.squared_norms(worker)

    def squared_norms(self, worker: int) -> dict[str, float] | None:
        """By table, of the mean of the gradients of all workers; None until all have pushed."""
        return None if worker in self._asking else dict(self._norms)

    def step(self, steps: Sequence[RowStep], worker: int, num_workers: int) -> list[RowStep]:
        """The next step of all workers, in their order, if it is now there of each; else none."""
        ready = self._with_gradients(steps, worker)
        if num_workers == 1:
            return ready
        self._steps.setdefault(worker, []).append(ready)
        if sum(map(bool, self._steps.values())) < num_workers:
            return []
        return [step for number in sorted(self._steps) for step in self._steps[number].pop(0)]

    def waiting(self, worker: int) -> int:
        """How many steps of a worker have not happened, as others' are not there."""
        return len(self._steps.get(worker, ()))

    def state(self) -> list[Any]:
        """All of it, as `wire` has it: for a checkpoint."""
        state = (self._gradients, self._asking, self._norms, self._steps)
        return [list(part.items()) for part in state]

    def load(self, state: list[Any]) -> None:
        """Go on from there."""
        self._gradients, self._asking, self._norms, self._steps = map(dict, state)

    def _with_gradients(self, steps: Sequence[RowStep], worker: int) -> list[RowStep]:
        pushed = self._gradients.get(worker, {})
        missing = [step.table for step in steps if step.factor is not None]
        missing = [table for table in missing if table not in pushed]
        if missing:
            raise ValueError(f"a step of {missing[0]} by worker {worker}, expected a push before")
        return [self._with_gradient(step, pushed.pop(step.table, None)) for step in steps]

    def _with_gradient(self, step: RowStep, pushed: Push | None) -> RowStep:
        if step.factor is None or pushed is None:
            return step
        gradient = pushed.gradient.to(self._bank.computing_dtype) * step.factor
        return step._replace(ids=pushed.ids, gradient=gradient, since=pushed.since, factor=None)

    def _squared_norm(self, table: str) -> float:
        """Of what a table's gradients add up to, in the order of the workers."""
        own = [self._gradients[worker].get(table) for worker in sorted(self._gradients)]
        parts = [self._bank.unwritten(push) for push in own if push is not None]
        ids = torch.cat([part.ids for part in parts])
        values = torch.cat([part.gradient for part in parts]).to(self._bank.computing_dtype)
        shape = torch.Size((self._bank.num_rows, values.shape[1]))
        return row_sparse(ids, values, shape).coalesce().values().double().square().sum().item()
