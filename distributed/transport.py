"""How a sharded bank reaches its shards: one call each, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sparsemem.distributed.calls import Call
from sparsemem.distributed.home import ShardHome, read_manifest
from sparsemem.distributed.server import CHANGES

Arguments = tuple[Any, ...]


@runtime_checkable
class Transport(Protocol):
    """S shards that can be asked."""

    @property
    def num_shards(self) -> int:
        """S."""

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One call of each shard's `operation`, all under way at once; what they answer, in order.

        None instead of arguments: that shard is not asked, and None stands for its answer.
        """

    def tell(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """As `ask`, without waiting. What is asked after it is done after it."""

    def close(self) -> None:
        """Let go of the shards."""


class Numbering:
    """Numbers the changes that one client asks each shard for: 1, 2, 3, ..."""

    def __init__(self, client: str, num_shards: int) -> None:
        self._client, self._last = client, [0] * num_shards

    def calls(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Call | None]:
        """One call for each shard that is asked."""
        return [
            None if given is None else self._call(shard, operation, given)
            for shard, given in enumerate(arguments)
        ]

    def _call(self, shard: int, operation: str, arguments: Arguments) -> Call:
        if operation not in CHANGES:
            return Call(operation, arguments)
        self._last[shard] += 1
        return Call(operation, arguments, self._client, self._last[shard])


class LocalShards:
    """Shards in this process: for tests, and to look at what a sharded bank holds without Ray."""

    def __init__(self, path: Path, client: str = "local") -> None:
        shards = range(read_manifest(path).num_shards)
        self.homes = [ShardHome(path, shard) for shard in shards]
        self._numbering = Numbering(client, len(self.homes))

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self.homes)

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One after another."""
        calls = self._numbering.calls(operation, arguments)
        return [
            None if call is None else home.call(call)
            for home, call in zip(self.homes, calls, strict=True)
        ]

    def tell(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """At once."""
        self.ask(operation, arguments)

    def close(self) -> None:
        """Let go of the folder."""
        for home in self.homes:
            home.close()
