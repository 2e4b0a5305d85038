"""Shards behind Ray actors: a killed one comes back from its folder, and callers wait for it."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError

from sparsemem.checks import check_positive
from sparsemem.distributed.calls import Call
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.home import ShardHome, read_manifest
from sparsemem.distributed.transport import Arguments, Numbering
from sparsemem.distributed.wire import Packed, received, sent

RETRY_SECONDS = 0.2


@ray.remote(max_restarts=-1, num_cpus=1)
class ShardActor:
    """One shard. Its folder has to be where every node that it may run on sees it."""

    def __init__(self, path: str, shard: int) -> None:
        self._home = ShardHome(Path(path), shard)

    def call(self, call: Packed) -> Packed:
        """What the shard answers."""
        return sent(self._home.call(Call(*received(call))))


class RayShards:
    """The transport of a sharded bank over Ray.

    A call that finds its shard gone is made again until the shard is back; what it changes is
    changed once, however often it is made.

    Args:
        actors: one a shard, in order.
        timeout: seconds after which a shard that has not answered is given up, with a ShardError.
    """

    def __init__(self, actors: Sequence[ActorHandle[Any]], timeout: float = 60.0) -> None:
        self._actors, self._timeout = list(actors), check_positive("timeout", timeout)
        self._numbering = Numbering(uuid.uuid4().hex, len(self._actors))

    @classmethod
    def start(cls, path: Path, *, timeout: float = 60.0, **options: Any) -> RayShards:
        """Actors for all shards of a sharded bank's folder, spread over the nodes.

        options: of each actor, as Ray has them: num_cpus, memory, ...
        """
        manifest = read_manifest(path)
        options = {"scheduling_strategy": "SPREAD", **options}
        actors = [
            ShardActor.options(**options).remote(str(path.absolute()), shard)  # type: ignore[attr-defined]
            for shard in range(manifest.num_shards)
        ]
        return cls(actors, timeout)

    @property
    def num_shards(self) -> int:
        """S."""
        return len(self._actors)

    def ask(self, operation: str, arguments: Sequence[Arguments | None]) -> list[Any]:
        """One call of each shard, all under way at once; what they answer, in order."""
        deadline = time.monotonic() + self._timeout
        calls = self._numbering.calls(operation, arguments)
        packed = [None if call is None else sent(tuple(call)) for call in calls]
        under_way = [self._begin(shard, call) for shard, call in enumerate(packed)]
        return [
            None if call is None else self._answer(shard, call, under_way[shard], deadline)
            for shard, call in enumerate(packed)
        ]

    def tell(self, operation: str, arguments: Sequence[Arguments | None]) -> None:
        """As `ask`, without waiting: a shard that is gone just then is not told."""
        for shard, call in enumerate(self._numbering.calls(operation, arguments)):
            if call is not None:
                self._begin(shard, sent(tuple(call)))

    def close(self) -> None:
        """End the actors; their folders stay."""
        for actor in self._actors:
            ray.kill(actor)

    def _begin(self, shard: int, call: Packed | None) -> Any:
        return None if call is None else self._actors[shard].call.remote(call)

    def _answer(self, shard: int, call: Packed, under_way: Any, deadline: float) -> Any:
        while True:
            left = deadline - time.monotonic()
            try:
                return received(ray.get(under_way, timeout=max(left, 0.001)))
            except GetTimeoutError:
                raise ShardError(
                    f"shard {shard} has not answered within {self._timeout:g} seconds"
                ) from None
            except RayActorError as error:  # it died before or during the call
                if left < RETRY_SECONDS:
                    raise ShardError(
                        f"shard {shard} is gone and did not come back: {error}"
                    ) from error
                time.sleep(RETRY_SECONDS)
                under_way = self._begin(shard, call)
