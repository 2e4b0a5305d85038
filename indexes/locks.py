"""Many readers or one writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Any number of threads may read together; a writer is alone.

    A waiting writer goes before readers that come later, and when a writer is done the readers
    that wait go before the next one: neither can keep the others out. A thread that holds the
    lock may take it again in the same way, and may read while it writes; it may not write while
    it only reads.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}  # thread: how many times it reads
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0  # writers
        self._parked = 0  # readers that wait
        self._phase = 0  # counts writers that are done
        self._owed = 0  # parked readers that go before the next writer

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock for reading."""
        me = threading.get_ident()
        with self._condition:
            if me not in self._readers and self._writer != me:
                self._park()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                    self._condition.notify_all()

    def _park(self) -> None:
        came = self._phase
        self._parked += 1
        try:
            while self._writer is not None or (self._waiting and came == self._phase):
                self._condition.wait()
        finally:
            self._parked -= 1
            if came != self._phase:
                self._owed -= 1
                self._condition.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold the lock alone."""
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                if me in self._readers:
                    raise RuntimeError(
                        "a thread that reads cannot start to write: it would wait for itself"
                    )
                self._wait_alone()
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._phase += 1
                    self._owed = self._parked
                    self._condition.notify_all()

    def _wait_alone(self) -> None:
        self._waiting += 1
        try:
            while self._writer is not None or self._readers or self._owed:
                self._condition.wait()
        finally:
            self._waiting -= 1
            self._condition.notify_all()  # for readers that gave way, if this was interrupted

    def is_writing(self) -> bool:
        """Whether the calling thread holds the lock alone."""
        return self._writer == threading.get_ident()
