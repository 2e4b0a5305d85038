"""Steps of the sparse memories and of rows, compiled; the torch code is the reference.

Which is used `SPARSEMEM_KERNELS` says (sparsemem/indexes/triton_switch.py). Nothing here imports
Numba before a kernel is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

from sparsemem.indexes.compiling import compiling_said, falling_back
from sparsemem.indexes.triton_switch import choice

DTYPES = (torch.float32, torch.float64)


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


class RowKernels(NamedTuple):
    """Compiled functions on rows of one dtype; `like` is an empty array of it."""

    like: Any
    step_rows: Any
    score_gradients: Any


def kernels_for(dtype: torch.dtype, links: bool) -> Kernels | None:
    """The kernels for a dtype, with temporal links or without; None: use the torch code."""
    return load(dtype, links) if choice() == "auto" and dtype in DTYPES else None


@cache
def load(dtype: torch.dtype, links: bool) -> Kernels | None:
    """Compile, or load what was compiled before; None with one warning where that fails."""
    with compiling_said(f"the memory step for {dtype}"), falling_back("memory steps"):
        return compile_for(dtype, links)
    return None


@cache
def can_find(dtype: torch.dtype) -> bool:
    """Compile `Kernels.unroll` for long episodes too, with their trees; False where that fails."""
    what, instead = f"sequences of long episodes for {dtype}", "are taken step by step, slower"
    with compiling_said(what), falling_back("sequences of long episodes", instead):
        from sparsemem.kernels.unroll import WITH_TREES

        compile_all(WITH_TREES, dtype)
        return True
    return False


def row_kernels_for(dtype: torch.dtype) -> RowKernels | None:
    """The kernels of rows for the dtype of a table; None: use the torch code."""
    return load_rows(dtype) if choice() != "reference" and dtype in DTYPES else None


@cache
def load_rows(dtype: torch.dtype) -> RowKernels | None:
    """As `load`, the kernels of rows."""
    with compiling_said(f"steps of rows for {dtype}"), falling_back("steps of banks' rows"):
        return compile_rows(dtype)
    return None


def compile_rows(dtype: torch.dtype) -> RowKernels:
    """Compile the kernels of rows for one dtype."""
    from numba import types

    from sparsemem.kernels.row_equations import ENTRIES, score_gradients, step_rows

    like, array = likeness(dtype)
    sizes, numbers, places = ENTRIES[step_rows]
    many = (*several(types.int64, sizes), *several(types.float64, numbers))
    step_rows.compile((array, *many, *several(types.int64, places)))
    score_gradients.compile((array, *several(types.int64, *ENTRIES[score_gradients])))
    return RowKernels(like, step_rows, score_gradients)


def likeness(dtype: torch.dtype) -> tuple[Any, Any]:
    """An empty array of a dtype, and its type as Numba calls it."""
    import numpy as np
    from numba import from_dtype, types

    like = np.empty(0, str(dtype).removeprefix("torch."))
    return like, types.Array(from_dtype(like.dtype), 1, "C")


def several(kind: Any, *lengths: int) -> list[Any]:
    """Numba's types of tuples of these lengths."""
    from numba import types

    tuple_of: Any = types.Tuple.from_types
    return [tuple_of([kind] * length) for length in lengths]


def compile_for(dtype: torch.dtype, links: bool) -> Kernels:
    """Compile for one dtype."""
    from sparsemem.kernels import gradients, steps

    like, _ = likeness(dtype)
    step = (steps.write_step, steps.search_step, steps.read_step, gradients.backward_step)
    if links:
        from sparsemem.kernels.links import ENTRIES, links_step

        rest = (links_step, None, None)
    else:
        from sparsemem.kernels.unroll import ENTRIES, unroll, unroll_backward

        rest = (None, unroll, unroll_backward)
    compile_all({**steps.ENTRIES, **gradients.ENTRIES, **ENTRIES}, dtype)
    return Kernels(like, *step, *rest)


def compile_all(entries: Mapping[Any, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Compile functions of an array of a dtype and of tuples of whole numbers of these lengths."""
    from numba import types

    _, array = likeness(dtype)
    for function, lengths in entries.items():
        function.compile((array, *several(types.int64, *lengths)))
