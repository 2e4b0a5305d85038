"""Elements of a batch in several threads, where there is enough to do for each.

Plain threads, as kernels don't hold Python's lock: Numba's own pools may not be used by two
Python threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Products added up, of one part: a tenth of a millisecond, more than it takes to hand it over.
WORK = 1_000_000

_own: int | None = None  # threads of kernels, where they are not as many as torch's


@cache
def pool(size: int) -> ThreadPoolExecutor:
    """Threads, kept for the next time."""
    return ThreadPoolExecutor(size, "sparsemem-kernels")


os.register_at_fork(after_in_child=pool.cache_clear)  # a fork has no threads but its own


def use_threads(count: int | None) -> None:
    """Share work out over at most so many threads from now on; None: as many as torch may use."""
    global _own
    _own = count


def own_threads() -> int | None:
    """What `use_threads` said last; None at first."""
    return _own


def num_threads() -> int:
    """How many threads kernels use at most."""
    return _own or torch.get_num_threads()


def in_parts(run: Callable[[int, int], object], batch_size: int, work: int) -> None:
    """run(begin, end) for elements 0 .. batch_size - 1, in as many threads as pay."""
    at_once(run, [*pairwise(shares(batch_size, work))])


def shares(batch_size: int, work: int) -> list[int]:
    """Where the parts of a batch begin that are worth a thread each, and where the last ends."""
    parts = max(1, min(batch_size, num_threads(), work // WORK))
    return [batch_size * part // parts for part in range(parts + 1)]


def at_once(run: Callable[..., Result], parts: Sequence[tuple[int, ...]]) -> list[Result]:
    """run(*part) for each part, in threads, the first in the caller's; what each returns.

    However it ends, no part is at work any more, unless the caller is interrupted again: so `run`
    keeps alive what it works on.
    """
    jobs = [pool(len(parts) - 1).submit(run, *part) for part in parts[1:]]
    try:
        first = run(*parts[0])
    finally:
        wait(jobs)
    return [first, *[job.result() for job in jobs]]
