"""One batch of training: backpropagation through time, whole or truncated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from sparsemem.errors import UserError
from sparsemem.models.captured import Captured
from sparsemem.optim import clip_grad_norm
from sparsemem.tasks import Batch, Task
from sparsemem.training.regions import region
from sparsemem.training.team import ALONE, Team


class Diverged(UserError):
    """The loss or the gradient is no longer finite; no parameter was changed by it."""


class BatchResult(NamedTuple):
    """What one batch of training showed."""

    loss: float
    metric: float
    touched: float
    gradient_norm: float


def chunks(batch: Batch, length: int | None) -> Iterator[Batch]:
    """The batch in pieces of at most `length` steps; whole if it is None."""
    steps = batch.input.shape[1]
    for start in range(0, steps, length or steps):
        yield batch.steps(start, min(start + (length or steps), steps))


@runtime_checkable
class Steps(Protocol):
    """What steps a model: an optimiser, or several as one."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last gradients."""

    def step(self) -> Any:
        """Step what has a gradient."""


def train_batch(
    model: nn.Module,
    task: Task,
    optimiser: Steps,
    batch: Batch,
    truncate: int | None = None,
    clip: float | None = None,
    team: Team = ALONE,
) -> BatchResult:
    """Train on one batch, one optimiser step for each chunk of `truncate` time steps.

    The state is carried from chunk to chunk and gradients are not (truncated BPTT,
    Williams & Peng 1990). Chunk losses share the normaliser of the whole sequence, so
    they add up to its loss. A chunk in which nothing is scored takes no optimiser step.
    `gradient_norm` is the largest of the chunks', before clipping to `clip`. A captured model
    replays a batch that is one chunk; what is in several is run step by step.

    Of a team each member takes its share of the batch, whose summed loss it divides by the mean
    normaliser of a share: the mean of their losses, and of their gradients, is that of the batch.
    The result is of the share.
    """
    state: Any = None
    outputs, loss, norm = [], 0.0, 0.0
    # Of the whole batch, as is what is scored: the members' shares may differ.
    normaliser = task.normaliser(batch).clamp(min=1) / team.size
    is_scored = numbers(*(chunk.mask.any() for chunk in chunks(batch, truncate)))
    batch = team.share(batch)
    parts = list(chunks(batch, truncate))
    if len(parts) > 1 and isinstance(model, Captured):
        model = model.model  # whose state is gone on with
    for chunk, scored in zip(parts, is_scored, strict=True):
        output, state = model(chunk.input, state)
        outputs.append(output.detach())
        if scored:
            with region("loss"):
                chunk_loss = task.loss(output, chunk, normaliser)
            of_chunk, norm_of_chunk = _update(model, optimiser, chunk_loss, clip)
            loss, norm = loss + of_chunk, max(norm, norm_of_chunk)
            del chunk_loss
        state = state.detach()
        del output  # or the graph of a chunk in which nothing is scored would outlive the next
    with region("loss"):
        found = task.metric(torch.cat(outputs, 1), batch)
        touched, metric = numbers(state.touched.to(torch.float64).mean(), found)
    return BatchResult(loss, metric, touched, norm)


def numbers(*scalars: torch.Tensor) -> list[float]:
    """The values of scalars, for which the host waits once."""
    values: list[float] = torch.stack([scalar.to(torch.float64) for scalar in scalars]).tolist()
    return values


def _update(
    model: nn.Module,
    optimiser: Steps,
    loss: torch.Tensor,
    clip: float | None,
) -> tuple[float, float]:
    """One optimiser step, if all is finite: the loss, and the gradient's norm before clipping."""
    optimiser.zero_grad(set_to_none=True)
    with region("autograd"):
        # Times 1; a loss that is not finite spoils the gradients, which a whole team sees.
        (loss * (1 + 0 * loss.detach())).backward()  # type: ignore[no-untyped-call]
    with region("optimiser"):
        limit = math.inf if clip is None else clip  # an infinite limit measures and leaves
        norm = clip_grad_norm(model.parameters(), limit)
        found = numbers(loss.detach(), norm)
        for name, value in zip(("loss", "gradient norm"), found, strict=True):
            if not math.isfinite(value):
                raise Diverged(f"the {name} is {value}")
        optimiser.step()
    return found[0], found[1]
