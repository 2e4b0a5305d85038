"""How a sharded bank reaches its shards: one call each, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

from sparsemem.distributed.asking import Arguments, Asking, Calls, Outcomes
from sparsemem.distributed.calls import Call
from sparsemem.distributed.home import ShardHome, read_manifest
from sparsemem.distributed.traffic import Traffic
from sparsemem.distributed.wire import received, sent


@runtime_checkable
class Transport(Protocol):
    """S shards that can be asked."""

    traffic: Traffic
    timeout: float  # seconds that a shard, or another worker, may take

    @property
    def num_shards(self) -> int:
        """S."""

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One call of each shard's `operation`, all under way at once; what they answer, in order.

        None instead of arguments: that shard is not asked, and None stands for its answer.
        """

    def begin(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """Ask for a change, and do not wait for it: see `Asking`."""

    @property
    def under_way(self) -> int:
        """How many changes were begun, and have not been heard to be done."""

    def settle(self, leave: int = 0) -> None:
        """Wait until at most `leave` changes are under way; raises what became of them."""

    def drop(self) -> None:
        """Forget changes that cannot be brought to their end."""

    def another(self) -> Transport:
        """For another client of the same shards, which do not end when it is closed."""

    def close(self) -> None:
        """Let go of the shards."""


class LocalShards(Asking):
    """Shards in this process: for tests, and to look at what a sharded bank holds without Ray."""

    timeout = 60.0

    def __init__(self, path: Path) -> None:
        self.homes: list[ShardHome] = []
        self._lock, self._is_owner = Lock(), True  # a shard does one thing after another
        self.traffic = Traffic()
        shards = range(read_manifest(path).num_shards)
        super().__init__(len(shards))
        try:
            self.homes.extend(ShardHome(path, shard) for shard in shards)
        except BaseException:
            self.close()
            raise

    def _exchange(self, calls: Calls, outcomes: Outcomes) -> None:
        """One after another."""
        for shard, call in enumerate(calls):
            if call is not None and shard not in outcomes:
                try:
                    outcomes[shard] = self._answer(shard, call)
                except ValueError as refused:
                    outcomes[shard] = refused

    def _answer(self, shard: int, call: Call) -> Any:
        """Packed as for another process, so that what is tested here is right there."""
        packed = self.traffic.count_sent(sent(tuple(call)))
        with self._lock:
            answer = self.homes[shard].call(Call(*received(packed)))
        return received(self.traffic.count_received(sent(answer)))

    def another(self) -> LocalShards:
        """For another client of the same shards, also in another thread."""
        other = LocalShards.__new__(type(self))
        Asking.__init__(other, self.num_shards)
        other.homes, other._lock, other._is_owner = self.homes, self._lock, False
        other.traffic = Traffic()
        return other

    def close(self) -> None:
        """Let go of the folder."""
        for home in self.homes if self._is_owner else ():
            home.close()
