"""Shards behind Ray actors: a killed one comes back from its folder, and callers wait for it."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from sparsemem.checks import check_positive
from sparsemem.distributed.asking import Asking, Calls, Outcomes
from sparsemem.distributed.calls import Call
from sparsemem.distributed.errors import ShardError
from sparsemem.distributed.home import ShardHome, read_manifest
from sparsemem.distributed.lines import ARE_THERE, Heard, Line, LostLine, Switchboard
from sparsemem.distributed.metrics import ShardMetrics
from sparsemem.distributed.traffic import Traffic
from sparsemem.distributed.wire import Packed, received, sent

RETRY_SECONDS = 0.2
CLOSE_SECONDS = 5.0  # for shards to write down what they have not
PATIENCE = 30.0
DEFAULTS = {"max_restarts": -1, "num_cpus": 1, "scheduling_strategy": "SPREAD"}  # of actors


class ShardActor:
    """One shard. Its folder has to be where every node that it may run on sees it.

    It is called by Ray and over lines, and does one thing after another.
    """

    def __init__(self, path: str, shard: int, patience: float) -> None:
        self._home, self._turn = ShardHome(Path(path), shard, patience), Lock()
        self._metrics = ShardMetrics(path, shard, self._stats)
        self._lines = Switchboard(self.call) if ARE_THERE else None
        gc.freeze()  # what there is by now stays: nothing to look through for garbage each time

    def call(self, call: Packed) -> Packed:
        """What the shard answers."""
        begun = time.perf_counter()
        with self._turn:
            asked = Call(*received(call))
            answer = sent(self._home.call(asked))
            self._metrics.count(asked.operation, time.perf_counter() - begun)
        return answer

    def _stats(self) -> dict[str, Any]:
        """Between two calls: one may put another bank in its place."""
        with self._turn:
            return self._home.server.bank.stats()

    def line(self) -> str:
        """Where clients on this machine have a line to the shard; empty if nowhere."""
        return "" if self._lines is None else self._lines.address


class RayShards(Asking):
    """The transport of a sharded bank over Ray.

    A call that finds its shard gone is made again until the shard is back; what it changes is
    changed once, however often it is made. The actors go with the process that started them. To
    those on this machine there are lines, which take less time than Ray's calls.

    Args:
        actors: one a shard, in order.
        timeout: seconds after which a shard that has not answered is given up, with a ShardError.
            What it was asked to change is not taken back: see `Asking`.
    """

    def __init__(self, actors: Sequence[ActorHandle[Any]], timeout: float = 60.0) -> None:
        super().__init__(len(actors))
        self.traffic, self._is_owner = Traffic(), True
        self.actors, self.timeout = list(actors), check_positive("timeout", timeout)
        self._lines = Lines(self.actors)

    @classmethod
    def start(
        cls, path: Path, *, timeout: float = 60.0, patience: float = PATIENCE, **options: Any
    ) -> RayShards:
        """Actors for all shards of a sharded bank's folder, spread over the nodes.

        Args:
            path: the folder; each node has to see it.
            timeout: as for the class.
            patience: seconds that a shard waits for the process that has its folder to be gone.
            options: of each actor, as Ray has them: num_cpus, memory, ...
        """
        manifest = read_manifest(path)
        options = {**DEFAULTS, **options}
        actor: Any = ray.remote(**options)(ShardActor)
        place = str(path.absolute())
        actors = [actor.remote(place, shard, patience) for shard in range(manifest.num_shards)]
        return cls(actors, timeout)

    def another(self) -> RayShards:
        """For another client of the same shards; closing it ends none of them."""
        other = RayShards(self.actors, self.timeout)
        other._is_owner = False
        return other

    def close(self) -> None:
        """End the actors; their folders stay."""
        self._lines.close()
        if self._is_owner:
            call = sent(tuple(Call("close", ())))
            closing: list[Any] = [actor.call.remote(call) for actor in self.actors]
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS, fetch_local=False)
            for actor in self.actors:
                ray.kill(actor)

    def _exchange(self, calls: Calls, outcomes: Outcomes) -> None:
        left = [None if shard in outcomes else call for shard, call in enumerate(calls)]
        self._start(left).collect(outcomes)

    def _start(self, calls: Calls) -> RayCalls:
        return RayCalls(self, calls)

    def _begin(self, shard: int, call: Packed) -> Any:
        """A call that is under way: `Heard` over a line, an object of Ray's otherwise."""
        line = self._lines.to(shard)
        if line is not None:
            return line.ask(call, self.timeout)
        return self.actors[shard].call.remote(call)

    def _answer(self, shard: int, call: Packed, under_way: Any, deadline: float) -> Packed:
        if isinstance(under_way, Heard):
            under_way.line.hear(under_way, deadline - time.monotonic())
            if under_way.answer is not None:
                return under_way.answer
            # It failed, and Ray says why; or the line is lost.
            under_way = self.actors[shard].call.remote(call)
        left = max(deadline - time.monotonic(), 0.001)
        answer: Packed = ray.get(under_way, timeout=left)
        return answer

    def _outcome(self, shard: int, call: Packed, under_way: Any, deadline: float) -> Any:
        """A shard's answer, or its ValueError."""
        while True:
            try:
                answer = self._answer(shard, call, under_way, deadline)
                return received(self.traffic.count_received(answer))
            except TimeoutError:
                what = f"has not answered within {self.timeout:g} seconds"
                raise ShardError(f"shard {shard} {what}") from None
            except RayTaskError as error:  # the shard's own
                if isinstance(error.cause, ValueError):
                    return error.cause
                raise error.cause from None
            except RayActorError as error:  # it died before or during the call
                self._lines.lost(shard)
                if isinstance(error, ActorDiedError):
                    raise ShardError(f"shard {shard} is gone for good: {reason(error)}") from None
                if deadline - time.monotonic() < RETRY_SECONDS:
                    what = f"has not come back within {self.timeout:g} seconds"
                    raise ShardError(f"shard {shard} {what}: {reason(error)}") from None
            time.sleep(RETRY_SECONDS)
            under_way = self._begin(shard, call)


class RayCalls:
    """Calls of actors that are under way. An actor does those of one caller in their order."""

    def __init__(self, shards: RayShards, calls: Calls) -> None:
        self._shards = shards
        self._asked = {
            shard: shards.traffic.count_sent(sent(tuple(call)))
            for shard, call in enumerate(calls)
            if call is not None
        }
        self._answers = {shard: shards._begin(shard, call) for shard, call in self._asked.items()}

    def is_done(self) -> bool:
        """Whether each is answered, or failed."""
        answers = list(self._answers.values())
        heard = [answer for answer in answers if isinstance(answer, Heard)]
        by_ray = [answer for answer in answers if not isinstance(answer, Heard)]
        if not all(answer.line.look(answer) for answer in heard):
            return False
        return not by_ray or len(done(by_ray)) == len(by_ray)

    def collect(self, outcomes: Outcomes) -> None:
        """Wait for the answers; a call whose shard is gone is made again until it is back."""
        deadline = time.monotonic() + self._shards.timeout
        failed: list[Exception] = []
        for shard, call in self._asked.items():  # whatever one of them says, the others are heard
            try:
                answer = self._answers[shard]
                outcomes[shard] = self._shards._outcome(shard, call, answer, deadline)
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]


class Lines:
    """A client's lines to those shards that are on its machine."""

    def __init__(self, actors: Sequence[ActorHandle[Any]]) -> None:
        self._actors = actors
        self._lines: dict[int, Line | None] = {}  # None: the shard is elsewhere
        self._asked: dict[int, Any] = {}  # where lines are

    def to(self, shard: int) -> Line | None:
        """The line to a shard; None while there is none."""
        line = self._lines.get(shard)
        if line is not None and not line.is_open:
            self.lost(shard)
        if shard not in self._lines:
            self._look(shard)
        return self._lines.get(shard)

    def lost(self, shard: int) -> None:
        """A shard is gone: once it is back it may be elsewhere."""
        line = self._lines.pop(shard, None)
        self._asked.pop(shard, None)
        if line is not None:
            line.close()

    def close(self) -> None:
        """Let go of all lines."""
        for shard in list(self._lines):
            self.lost(shard)

    def _look(self, shard: int) -> None:
        """Ask where a shard's line is, without waiting for the answer, or connect to it."""
        if shard not in self._asked:
            self._asked[shard] = self._actors[shard].line.remote()
        if done([self._asked[shard]]):
            with suppress(RayError):  # it died: whoever asks it next hears of that
                address = ray.get(self._asked[shard])
                self._lines[shard] = None
                with suppress(OSError, LostLine):
                    self._lines[shard] = Line(address) if address else None
            del self._asked[shard]


def done(under_way: list[Any]) -> list[Any]:
    """Those of Ray's calls that are answered, or failed."""
    number = len(under_way)
    return ray.wait(under_way, num_returns=number, timeout=0, fetch_local=False)[0]


def reason(error: RayActorError) -> str:
    """The last line of what Ray says, which is the shard's own error if it had one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
