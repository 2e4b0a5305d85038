"""Elements of a batch in several threads, where there is enough to do for each.

Plain threads, as kernels don't hold Python's lock: Numba's own pools may not be used by two
Python threads at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

# Products added up, of one part: a tenth of a millisecond, more than it takes to hand it over.
WORK = 1_000_000


@cache
def pool(size: int) -> ThreadPoolExecutor:
    """Threads, kept for the next time."""
    return ThreadPoolExecutor(size, "sparsemem-kernels")


os.register_at_fork(after_in_child=pool.cache_clear)  # a fork has no threads but its own


def in_parts(run: Callable[[int, int], object], batch_size: int, work: int) -> None:
    """run(begin, end) for elements 0 .. batch_size - 1, in as many threads as torch may use.

    `run` keeps alive what it works on: a part goes on when the caller is interrupted.
    """
    parts = min(batch_size, torch.get_num_threads(), work // WORK)
    if parts < 2:
        run(0, batch_size)
        return
    bounds = [batch_size * part // parts for part in range(parts + 1)]
    others = pool(parts - 1)
    jobs = [others.submit(run, *bounds[part : part + 2]) for part in range(1, parts)]
    run(*bounds[:2])
    for job in jobs:
        job.result()
