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

from sparsemem.indexes.triton_switch import choice

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


def changed_rows() -> ModuleType | None:
    """The compiled loops of a buffer of changed rows; None: use the numpy code."""
    return None if choice() == "reference" else _changed_rows()


@cache
def _changed_rows() -> ModuleType | None:
    with compiling_said("an index's upkeep"), falling_back("notices of changed rows"):
        from sparsemem.indexes import changed_rows as loops

        loops.compile_all()
        return loops
    return None
