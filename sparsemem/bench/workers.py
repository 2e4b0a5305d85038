"""A process of its own for each point, so that its peak of memory is its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from sparsemem.bench.errors import BenchError
from sparsemem.bench.measuring import seconds

GRACE = 10.0  # seconds to wait for the exit code of a process that has ended


class Made(NamedTuple):
    """A point that is ready: what was found once, and what is timed again and again."""

    figures: dict[str, float]
    work: Mapping[str, Callable[[], object]]


@runtime_checkable
class Point(Protocol):
    """What is measured; it is sent to the process that measures it."""

    def make(self) -> Made:
        """Build it, warm it up, and find what is found once."""


class WorkerError(BenchError):
    """The process of a point died, took too long, or raised."""


class Worker:
    """A process that makes a point, then times its work whenever it is asked to."""

    def __init__(self, point: Point, threads: int = 1) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(point, threads, there), daemon=True)
        self._process.start()
        there.close()  # so that the process's death is an end of file here

    def made(self, limit: float) -> dict[str, float]:
        """Wait until the point is made; its figures, and "make_seconds" without imports."""
        result: dict[str, float] = self._answer(limit)
        return result

    def measure(self, limit: float) -> dict[str, float]:
        """Seconds of each of its functions, once more."""
        self._pipe.send(True)
        result: dict[str, float] = self._answer(limit)
        return result

    def _answer(self, limit: float) -> Any:
        """The next answer; WorkerError if none comes within `limit` seconds."""
        try:
            if not self._pipe.poll(max(limit, 0)):
                raise WorkerError(f"took longer than the {max(limit, 0):.0f} s that were left")
            ok, value = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(GRACE)
            code = self._process.exitcode
            killed = ", killed, perhaps for lack of memory" if code == -9 else ""
            raise WorkerError(f"its process ended with code {code}{killed}") from None
        if not ok:
            raise WorkerError(value)
        return value

    def close(self) -> None:
        """End the process at once, whatever it is doing: it has nothing to lose."""
        self._pipe.close()
        self._process.kill()
        self._process.join()


def _serve(point: Point, threads: int, pipe: Connection) -> None:
    """The life of a worker's process: make, then measure for each True received."""
    try:
        _use_threads(threads)
        torch.manual_seed(0)
        start = time.perf_counter()
        made = point.make()
        pipe.send((True, {**made.figures, "make_seconds": time.perf_counter() - start}))
        while pipe.recv():
            pipe.send((True, {name: seconds(work) for name, work in made.work.items()}))
    except EOFError:
        return  # nobody asks any more
    except Exception as error:
        lines = str(error).splitlines() or [""]
        pipe.send((False, f"{type(error).__name__}: {lines[0]}"))


def _use_threads(count: int) -> None:
    torch.set_num_threads(count)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(count)
