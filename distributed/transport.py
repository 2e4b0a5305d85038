"""How a sharded bank reaches its shards: one call each, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from sparsemem.distributed.shard import ShardBank

Arguments = tuple[Any, ...]


@runtime_checkable
class Transport(Protocol):
    """S shards that can be asked."""

    @property
    def num_shards(self) -> int:
        """S."""

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One call of each shard's `operation`, all under way at once; what they return, in order.

        None instead of arguments: that shard is not asked, and None stands for its answer.
        """

    def tell(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """As `ask`, without waiting. What is asked after it is done after it."""

    def close(self) -> None:
        """Let go of the shards."""


class LocalShards:
    """Shards in this process: for tests, and to look at what a checkpoint of many shards holds."""

    def __init__(self, shards: Sequence[ShardBank]) -> None:
        self.shards = list(shards)

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.shards)

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One after another."""
        return [
            None if given is None else getattr(shard, operation)(*given)
            for shard, given in zip(self.shards, arguments, strict=True)
        ]

    def tell(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """At once."""
        self.ask(operation, arguments)

    def close(self) -> None:
        """Stop what runs in the background."""
        for shard in self.shards:
            shard.close()
