"""Measuring a model on a split of its task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsemem.models.base import MemoryModel
from sparsemem.tasks import Batch, Task


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
    on_batch: Callable[[], Any] | None = None,
) -> Result:
    """Run the model over the first batches of a split; leaves it in the mode it was in."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    wrong = total = loss = terms = touched = 0.0
    sequences = 0
    for batch in task.evaluation_batches(split, batches, level):
        batch = batch.to(device)
        output, state = model(batch.input)
        one_wrong, one_total = task.score(output, batch)
        wrong, total = wrong + one_wrong.item(), total + one_total.item()
        loss, terms = (
            loss + task.summed_loss(output, batch).item(),
            terms + task.normaliser(batch).item(),
        )
        touched += state.touched.sum().item()
        sequences += len(batch.input)
        if on_batch is not None:
            on_batch()
    model.train(was_training)
    return Result(
        split,
        level,
        sequences,
        task.metric_name,
        wrong / total,
        loss / max(terms, 1),
        touched / sequences,
        None,
    )


def predictor(model: MemoryModel) -> Callable[[Batch], Tensor]:
    """A function from a batch to the model's output for it, in evaluation mode."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def predict(batch: Batch) -> Tensor:
        model.eval()
        output: Tensor = model(batch.to(device).input)[0]
        return output

    return predict
