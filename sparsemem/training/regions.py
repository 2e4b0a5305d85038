"""Where a training step's time goes: named regions, timed only while somebody listens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch.profiler import record_function

PREFIX = "sparsemem: "  # of regions in a trace


class Stopwatch:
    """Seconds of each region without those of the regions inside it."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._open: list[str] = []
        self._since = clock()

    def enter(self, name: str) -> None:
        """A region begins; the one around it waits."""
        self._spend()
        self._open.append(name)

    def leave(self) -> None:
        """The innermost region ends."""
        self._spend()
        self._open.pop()

    def _spend(self) -> None:
        now = self._clock()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


_listening: Stopwatch | None = None


@contextmanager
def listening(stopwatch: Stopwatch) -> Iterator[None]:
    """Time regions in the block."""
    global _listening
    before, _listening = _listening, stopwatch
    try:
        yield
    finally:
        _listening = before


@contextmanager
def region(name: str) -> Iterator[None]:
    """A part of a step. Costs next to nothing while nobody listens."""
    stopwatch = _listening
    if stopwatch is None:
        yield
        return
    stopwatch.enter(name)
    try:
        with record_function(PREFIX + name):
            yield
    finally:
        stopwatch.leave()


def in_region(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, each call of which is in a region."""

    @wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        with region(name):
            return function(*arguments, **options)

    return timed
