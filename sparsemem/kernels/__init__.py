"""Fused steps of the sparse memories, compiled; the torch code beside them is the reference.

Which is used `SPARSEMEM_KERNELS` says (sparsemem/indexes/triton_switch.py). Nothing here imports
Numba before a kernel is needed.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from sparsemem.indexes.triton_switch import choice

DTYPES = (torch.float32, torch.float64)
SILENT_SECONDS = 3.0  # loading from the cache takes one, two on a busy machine; compiling twenty


class Kernels(NamedTuple):
    """Compiled functions for one dtype; `like` is an empty array of it. None: not asked for."""

    like: Any
    write_step: Any
    search_step: Any
    read_step: Any
    backward_step: Any
    links_step: Any  # with links
    unroll: Any  # without links
    unroll_backward: Any


def kernels_for(dtype: torch.dtype, links: bool) -> Kernels | None:
    """The kernels for a dtype, with temporal links or without; None: use the torch code."""
    return load(dtype, links) if choice() == "auto" and dtype in DTYPES else None


@cache
def load(dtype: torch.dtype, links: bool) -> Kernels | None:
    """Compile, or load what was compiled before; None with one warning where that fails."""
    try:
        with compiling_said(dtype):
            return compile_for(dtype, links)
    except Exception as error:  # whatever Numba or LLVM stumbles over
        warnings.warn(
            f"memory steps run in plain torch, several times slower: {type(error).__name__} while"
            f" compiling their kernels with Numba: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def compile_for(dtype: torch.dtype, links: bool) -> Kernels:
    """Compile for one dtype."""
    import numpy as np
    from numba import from_dtype, types

    from sparsemem.kernels import gradients, steps

    like = np.empty(0, str(dtype).removeprefix("torch."))
    array = types.Array(from_dtype(like.dtype), 1, "C")
    step = (steps.write_step, steps.search_step, steps.read_step, gradients.backward_step)
    if links:
        from sparsemem.kernels.links import ENTRIES, links_step

        rest = (links_step, None, None)
    else:
        from sparsemem.kernels.unroll import ENTRIES, unroll, unroll_backward

        rest = (None, unroll, unroll_backward)
    entries = {**steps.ENTRIES, **gradients.ENTRIES, **ENTRIES}
    for function, lengths in entries.items():
        tuples = (types.UniTuple(types.int64, n) for n in lengths)  # type: ignore[no-untyped-call]
        function.compile((array, *tuples))
    return Kernels(like, *step, *rest)


@contextmanager
def compiling_said(dtype: torch.dtype) -> Iterator[None]:
    """Say on stderr what is going on, where it takes long."""

    def say() -> None:
        what = f"the memory step for {dtype}, once on this machine"
        print(f"sparsemem: compiling {what}", file=sys.stderr, flush=True)

    timer = threading.Timer(SILENT_SECONDS, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
