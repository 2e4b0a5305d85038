"""Measuring a model on a split of its task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from sparsemem.models.base import MemoryModel
from sparsemem.tasks import Batch, Task
from sparsemem.training.bptt import numbers


class Result(NamedTuple):
    """What an evaluation found; `metric` is over all sequences, `touched` their mean."""

    split: str
    level: int
    sequences: int
    metric_name: str
    metric: float
    loss: float
    touched: float
    per_task: dict[str, float] | None

    def line(self) -> str:
        """The result in one line."""
        name = self.metric_name + (" a sequence" if self.metric_name == "wrong bits" else "")
        return f"{name}: {self.metric:.4g} (level {self.level}, {self.sequences} sequences)"


@torch.no_grad()
def evaluate(
    model: MemoryModel,
    task: Task,
    *,
    split: str,
    level: int,
    batches: int | None = None,
) -> Result:
    """Run the model over the first batches of a split; leaves it in the mode it was in.

    Over all of it (`batches` is None), `per_task` has the metric of each part of the task.
    """
    was_training = model.training
    model.eval()
    tallies = {
        name: _tally(model, part, part.evaluation_batches(split, batches, level))
        for name, part in _parts(task, split, batches).items()
    }
    model.train(was_training)
    whole = Tally(*map(sum, zip(*tallies.values(), strict=True)))
    return Result(
        split,
        level,
        int(whole.sequences),
        task.metric_name,
        whole.wrong / whole.total,
        whole.loss / max(whole.terms, 1),
        whole.touched / whole.sequences,
        None if "" in tallies else {name: t.wrong / t.total for name, t in tallies.items()},
    )


class Tally(NamedTuple):
    """Sums over the sequences seen."""

    sequences: float = 0
    wrong: float = 0
    total: float = 0
    loss: float = 0
    terms: float = 0
    touched: float = 0


def _parts(task: Task, split: str, batches: int | None) -> dict[str, Task]:
    """What to tell apart: the parts that have something in the split, or the task itself.

    The first few batches are a sample of the whole, too small for figures of its parts.
    """
    parts = task.parts() if batches is None else {}
    return {name: part for name, part in parts.items() if part.has(split)} or {"": task}


def _tally(model: MemoryModel, task: Task, batches: Iterable[Batch]) -> Tally:
    device = next(model.parameters()).device
    tally = Tally()
    for batch in batches:
        batch = batch.to(device)
        output, state = model(batch.input)
        wrong, total = task.score(output, batch)
        loss, terms = task.summed_loss(output, batch), task.normaliser(batch)
        sums = numbers(wrong, total, loss, terms, state.touched.sum())
        tally = Tally(*map(sum, zip(tally, (len(batch.input), *sums), strict=True)))
    return tally
