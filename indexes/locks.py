"""Many readers or one writer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ReadWriteLock:
    """Any number of threads may read together; a writer is alone.

    A waiting writer goes before new readers. A thread that holds the lock may take it again in
    the same way, and may read while it writes; it may not write while it only reads.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}  # thread: how many times it reads
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold the lock for reading."""
        me = threading.get_ident()
        with self._condition:
            while me not in self._readers and self._writer != me and self._is_closed():
                self._condition.wait()
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
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
                self._waiting += 1
                try:
                    while self._writer is not None or self._readers:
                        self._condition.wait()
                finally:
                    self._waiting -= 1
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._condition.notify_all()

    def is_writing(self) -> bool:
        """Whether the calling thread holds the lock alone."""
        return self._writer == threading.get_ident()

    def _is_closed(self) -> bool:
        return self._writer is not None or self._waiting > 0
