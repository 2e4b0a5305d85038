"""Who trains together: members that take a share of every batch each, and see the same figures.

Every member makes the same batches, which are the whole team's, and takes its share. Gradients are
averaged over the team: a member counts the loss of its share `size` times (see `train_batch`).
What the team agrees on (losses, metrics, the validation, when to stop) is the same numbers on all
members, so that all take the same turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

from sparsemem.tasks import Batch
from sparsemem.training.errors import ConfigError

AnyModel = TypeVar("AnyModel", bound=nn.Module)


@runtime_checkable
class Team(Protocol):
    """What a trainer needs of those it trains with. All members make the same calls in turn."""

    @property
    def rank(self) -> int:
        """This member's number, from 0. Number 0 writes, validates and saves for all."""

    @property
    def size(self) -> int:
        """How many members there are."""

    def share(self, batch: Batch) -> Batch:
        """This member's share of a batch (see `share_of`)."""

    def means(self, values: Sequence[float]) -> list[float]:
        """The mean of each value over the team, the same on all members."""

    def told(self, values: Sequence[float]) -> list[float]:
        """The values of member 0, on all members; the others' are as many, and do not count.

        No member gets them before member 0 has come here.
        """

    def asked(self, stop: bool) -> bool:
        """Whether a member was asked to stop: the same on all, by the next `means` at the latest.

        stop: whether this one was. A team may send it along with the next `means`, and answer by
        what was sent along with the last.
        """

    def wrapped(self, model: AnyModel) -> AnyModel | nn.Module:
        """The model whose dense gradients are averaged over the team in its backward passes."""


class Alone:
    """A team of one."""

    rank, size = 0, 1

    def share(self, batch: Batch) -> Batch:
        """All of it."""
        return batch

    def means(self, values: Sequence[float]) -> list[float]:
        """The values."""
        return list(values)

    def told(self, values: Sequence[float]) -> list[float]:
        """The values."""
        return list(values)

    def asked(self, stop: bool) -> bool:
        """Whether this one was."""
        return stop

    def wrapped(self, model: AnyModel) -> AnyModel:
        """The model as it is."""
        return model


ALONE = Alone()


def share_of(batch: Batch, rank: int, size: int) -> Batch:
    """The sequences of member `rank` of `size`: contiguous, and as many for each member."""
    count = len(batch.input)
    if count % size:
        raise ValueError(f"batch has {count} sequences, expected a multiple of {size} members")
    each = count // size
    return Batch(*(tensor[rank * each : (rank + 1) * each] for tensor in batch))


def check_shares(batch_size: int, size: int) -> None:
    """ConfigError where a batch cannot be shared out evenly."""
    if batch_size % size:
        raise ConfigError(
            f"training.batch_size is {batch_size}, expected a multiple of the number of workers"
            f" = {size}: each takes as many sequences of a batch"
        )
