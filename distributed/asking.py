"""Changes that a client asks shards for: each done once, though answers are lost.

A change goes to several shards under a number of its own at each. Until all have answered it is
open: an answer that did not come (ShardError) or could not be given (a shard's disk is full) leaves
it so. The next thing asked first brings it to its end, under the same numbers, so that nothing is
asked of half a change; asking for the same again is taken for that and not for another change.
"""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from sparsemem.distributed.calls import Call
from sparsemem.distributed.server import CHANGES
from sparsemem.distributed.wire import pack

Arguments = tuple[Any, ...]
Calls = Sequence[Call | None]  # one a shard; None: it is not asked
Outcomes = dict[int, Any]  # answers by shard; a ValueError where the shard refused


class Change(NamedTuple):
    """One that is under way."""

    calls: list[Call | None]
    outcomes: Outcomes


class Asking(ABC):
    """A client of S shards. It may be used by one thread at a time."""

    _open: Change | None  # it has not come to its end

    def __init__(self, num_shards: int) -> None:
        self._num_shards = num_shards
        self._begin_anew()

    @property
    def num_shards(self) -> int:
        """S."""
        return self._num_shards

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One call of each shard, all under way at once; what they answer, in order."""
        if operation == "restore":
            self._begin_anew()  # shards forget what they were asked since
        calls = self._calls(operation, arguments)
        pack(calls)  # what cannot be sent is refused here
        if operation in CHANGES and self._open is not None and same(self._open.calls, calls):
            return self._finish(self._open)
        self.settle()
        if operation in CHANGES:
            change = self._open = Change(self._calls(operation, arguments), {})
            return self._finish(change)
        outcomes: Outcomes = {}
        self._exchange(calls, outcomes)
        return answers(outcomes, self._num_shards)

    def settle(self) -> None:
        """Bring a change to its end that was cut short. Raises what cuts it short again."""
        if self._open is not None:
            with suppress(ValueError):  # refused, as it would have been at once
                self._finish(self._open)

    @abstractmethod
    def _exchange(self, calls: Calls, outcomes: Outcomes) -> None:
        """Make the calls that have no outcome yet, and enter each one's.

        A ValueError is the outcome of a call; with any other error the call has none, and it is
        raised.
        """

    def _finish(self, change: Change) -> list[Any]:
        self._exchange(change.calls, change.outcomes)
        self._open = None
        for shard in change.outcomes:
            self._last[shard] += 1
        return answers(change.outcomes, self._num_shards)

    def _begin_anew(self) -> None:
        """As another client, with no change open."""
        self._client, self._last = uuid.uuid4().hex, [0] * self._num_shards
        self._open = None

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
