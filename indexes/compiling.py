"""Where compiled (Numba) code comes from: what it says while it compiles, and how it fails.

Numba keeps what it compiled on disk and makes it anew when the file of the function that was
asked for changes. Nothing here imports it before it is needed.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from sparsemem.indexes.triton_switch import choice

COMPILED_DTYPES = (torch.float32, torch.float64)  # of rows as they are computed with
SILENT_SECONDS = 3.0  # loading from the cache takes one, two on a busy machine; compiling twenty


@contextmanager
def falling_back(
    what: str, instead: str = "run in plain torch, several times slower"
) -> Iterator[None]:
    """Go on after the block, with a warning, whatever Numba or LLVM stumbles over."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"{what} {instead}: {type(error).__name__} while"
            f" compiling their kernels with Numba: {error}",
            RuntimeWarning,
            stacklevel=4,
        )


@contextmanager
def compiling_said(what: str) -> Iterator[None]:
    """Say on stderr what is going on, where it takes long."""

    def say() -> None:
        message = f"sparsemem: compiling {what}, once on this machine"
        print(message, file=sys.stderr, flush=True)

    timer = threading.Timer(SILENT_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def loops_for(rows: Tensor) -> ModuleType | None:
    """The compiled loops over rows of a table that lies here; None: use the numpy or torch code."""
    return None if choice() == "reference" or rows.device.type != "cpu" else _loops()


@cache
def _loops() -> ModuleType | None:
    with compiling_said("an index's loops"), falling_back("searches of an index and its upkeep"):
        from sparsemem.indexes import loops

        loops.compile_all()
        return loops
    return None
