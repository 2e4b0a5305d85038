"""A background thread that looks after an object, for as long as that lives."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

NICE = 5  # the searches go before the upkeep, where the system lets a thread stand back


@runtime_checkable
class Maintained(Protocol):
    """What a worker looks after."""

    def maintain(self) -> None:
        """Do what is due."""


class Worker:
    """Calls `maintain` of an object whenever it is woken; does not keep the object alive."""

    def __init__(self, target: Maintained) -> None:
        self._wake, self._stopped = threading.Event(), threading.Event()
        reference = weakref.ref(target, lambda _: self._wake.set())
        self._thread = self.start(_run, reference, self._wake, self._stopped)

    @property
    def stopped(self) -> bool:
        """Whether everything is to end: long work is to look at this now and then."""
        return self._stopped.is_set()

    def wake(self) -> None:
        """Have `maintain` called soon."""
        self._wake.set()

    def start(self, function: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Run a function in a thread of its own, which `stop` waits for."""
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        with _guard:
            _running[thread] = self
            thread.start()  # who stops at the same time cannot wait for one that has not begun
        return thread

    def stop(self) -> None:
        """Return when nothing runs any more."""
        self._stopped.set()
        self._wake.set()
        for thread, worker in all_running():
            if worker is self and thread is not threading.current_thread():
                thread.join()


# Threads that are cut off inside C++ take the interpreter down with them: they are waited for.
_running: weakref.WeakKeyDictionary[threading.Thread, Worker] = weakref.WeakKeyDictionary()
_guard = threading.RLock()  # it must not grow while it is looked through


def all_running() -> list[tuple[threading.Thread, Worker]]:
    """Threads that have not ended, and whose they are."""
    with _guard:
        return list(_running.items())


@atexit.register
def _stop_all() -> None:
    for worker in {worker for _, worker in all_running()}:
        worker.stop()


class Rest:
    """Of work in the background, for so many times as long as it took."""

    def __init__(self) -> None:
        self._ended = self._took = self._cut = 0.0

    @contextlib.contextmanager
    def after(self) -> Iterator[None]:
        """The work is done inside."""
        started = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took = 0.0 if self._cut >= started else self._ended - started

    def is_over(self, times: int) -> bool:
        """Whether so many times as long as the work took went by since."""
        return time.monotonic() >= self._ended + times * self._took

    def cut_short(self) -> None:
        """It is over; after work that is being done there will be none."""
        self._cut, self._took = time.monotonic(), 0.0


def tell(message: str) -> None:
    """Warn; where warnings are errors, upkeep goes on all the same (`stats` has it too)."""
    with contextlib.suppress(UserWarning):
        warnings.warn(message, stacklevel=3)


def stand_back(nice: int) -> None:
    """Lower the priority of the calling thread, and let it use one core."""
    if sys.platform == "linux":  # elsewhere a priority is the whole process's
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            nice = max(nice, os.getpriority(os.PRIO_PROCESS, thread))  # and not raise it
            os.setpriority(os.PRIO_PROCESS, thread, nice)
    with contextlib.suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(1)  # of this thread alone


def _run(
    reference: weakref.ref[Maintained], wake: threading.Event, stopped: threading.Event
) -> None:
    stand_back(NICE)
    while True:
        wake.wait()
        wake.clear()
        target = reference()
        if target is None or stopped.is_set():
            return
        target.maintain()
        del target  # or the worker would keep it alive while it sleeps
