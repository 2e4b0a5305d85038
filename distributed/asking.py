"""Changes that a client asks shards for: each done once, though answers are lost.

A change goes to several shards under a number of its own at each. Until all have answered it is
open: an answer that did not come (ShardError) or could not be given (a shard's disk is full) leaves
it so. The next thing asked first brings it to its end, under the same numbers, so that nothing is
asked of half a change; asking for the same again is taken for that and not for another change.

A change may also be begun and not waited for. Those that were begun are under way until they are
heard to be done, in their order, whatever had to be asked again.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from sparsemem.bank.errors import BankError
from sparsemem.distributed.calls import Call
from sparsemem.distributed.errors import OutOfTurnError, ShardError
from sparsemem.distributed.server import CHANGES
from sparsemem.distributed.wire import pack

Arguments = tuple[Any, ...]
Calls = Sequence[Call | None]  # one a shard; None: it is not asked
Outcomes = dict[int, Any]  # answers by shard; a ValueError where the shard refused


@runtime_checkable
class UnderWay(Protocol):
    """Calls that were made and have not been waited for."""

    def is_done(self) -> bool:
        """Whether each has an outcome, or failed."""

    def collect(self, outcomes: Outcomes) -> None:
        """Wait for them, as `Asking._exchange` does."""


@dataclass(eq=False)
class Change:
    """One that has not come to its end."""

    calls: list[Call | None]
    outcomes: Outcomes = field(default_factory=dict)
    under_way: UnderWay | None = None  # None: what has no outcome has to be asked


@dataclass(frozen=True)
class Exchanged:
    """Calls that were waited for when they were made."""

    outcomes: Outcomes
    failed: Exception | None

    def is_done(self) -> bool:
        """They are."""
        return True

    def collect(self, outcomes: Outcomes) -> None:
        """What came of them then."""
        outcomes.update(self.outcomes)
        if self.failed is not None:
            raise self.failed


class Asking(ABC):
    """A client of S shards. It may be used by one thread at a time."""

    _open: Change | None  # it was cut short
    _begun: deque[Change]  # in their order

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._begin_anew()

    @property
    def num_shards(self) -> int:
        """S."""
        return self._num_shards

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One call of each shard, all under way at once; what they answer, in order.

        A change waits for those that were begun; anything else may be answered before them.
        """
        calls = self._calls(operation, arguments)
        pack(calls)  # what cannot be sent is refused here
        if operation in CHANGES and self._open is not None and same(self._open.calls, calls):
            return self._finish(self._open)
        self._settle_open()
        if operation in CHANGES:
            self.settle()
            change = self._open = Change(self._calls(operation, arguments))
            return self._finish(change)
        outcomes: Outcomes = {}
        self._exchange(calls, outcomes)
        return answers(outcomes, self._num_shards)

    def begin(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """Ask for a change, and do not wait: `settle` says how it went.

        Each shard does a client's changes in the order in which it was asked for them.
        """
        self._settle_open()
        calls = self._calls(operation, arguments)
        pack(calls)
        change = Change(calls)
        self._begun.append(change)
        self._count(change)
        with suppress(Exception):  # whoever settles it asks for it again, and is told
            change.under_way = self._start(calls)

    @property
    def under_way(self) -> int:
        """How many changes were begun, and have not been heard to be done."""
        return len(self._begun)

    def settle(self, leave: int = 0) -> None:
        """Wait until at most `leave` changes are under way, and none is cut short.

        Hears of those that are done by now. Raises what cuts one short, which then is asked again
        by the next `settle`; and the refusal of one that was begun, once.
        """
        while self._begun and (len(self._begun) > leave or self._is_done(self._begun[0])):
            change = self._begun[0]
            self._complete(change)
            self._begun.popleft()
            answers(change.outcomes, self._num_shards)
        self._settle_open()

    def drop(self) -> None:
        """Forget changes that cannot be brought to their end: the shards are about to go back."""
        with suppress(ShardError, BankError, ValueError):
            self.settle()
        self._begin_anew()

    def _settle_open(self) -> None:
        if self._open is not None:
            with suppress(ValueError):  # refused, as it would have been at once
                self._finish(self._open)

    def _is_done(self, change: Change) -> bool:
        return change.under_way is None or change.under_way.is_done()  # None: it was cut short

    def _complete(self, change: Change) -> None:
        """All outcomes of a change that was begun; those before it have theirs."""
        under_way, change.under_way = change.under_way, None
        if under_way is not None:
            with suppress(OutOfTurnError):  # one before it had to be asked again, so has this one
                under_way.collect(change.outcomes)
        self._exchange(change.calls, change.outcomes)

    def _start(self, calls: Calls) -> UnderWay:
        """Make calls, in the order of all that are made. By itself it waits for them."""
        outcomes: Outcomes = {}
        try:
            self._exchange(calls, outcomes)
        except Exception as failed:
            return Exchanged(outcomes, failed)
        return Exchanged(outcomes, None)

    @abstractmethod
    def _exchange(self, calls: Calls, outcomes: Outcomes) -> None:
        """Make the calls that have no outcome yet, and enter each one's.

        A ValueError is the outcome of a call; with any other error the call has none, and it is
        raised.
        """

    def _finish(self, change: Change) -> list[Any]:
        self._exchange(change.calls, change.outcomes)
        self._open = None
        self._count(change)
        return answers(change.outcomes, self._num_shards)

    def _begin_anew(self) -> None:
        """As another client, with no change open."""
        self._client, self._last = uuid.uuid4().hex, [0] * self._num_shards
        self._open, self._begun = None, deque()

    def _count(self, change: Change) -> None:
        """Its numbers are used."""
        for shard, call in enumerate(change.calls):
            self._last[shard] += call is not None

    def _calls(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Call | None]:
        return [
            None if given is None else self._call(shard, operation, given)
            for shard, given in enumerate(arguments)
        ]

    def _call(self, shard: int, operation: str, given: Arguments) -> Call:
        if operation not in CHANGES:
            return Call(operation, given)
        return Call(operation, given, self._client, self._last[shard] + 1)


def answers(outcomes: Outcomes, num_shards: int) -> list[Any]:
    """What the shards answered, None for those not asked. Raises the first refusal."""
    for shard in sorted(outcomes):
        if isinstance(outcomes[shard], ValueError):
            raise outcomes[shard]
    return [outcomes.get(shard) for shard in range(num_shards)]


def same(one: Calls, other: Calls) -> bool:
    """Whether two lists of calls ask for the same, to the last bit."""
    (tree, tensors), (other_tree, others) = pack(list(one)), pack(list(other))
    return tree == other_tree and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(tensors, others, strict=True)
    )
