"""Where the kernels of trees come from: as those of steps, when a long episode needs them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from sparsemem.indexes.compiling import compiling_said, falling_back
from sparsemem.indexes.triton_switch import choice
from sparsemem.kernels import compile_all, likeness


class TreeKernels(NamedTuple):
    """Compiled functions on trees, for float32 directions; `like` is an empty array of these."""

    like: Any
    enter_rows: Any
    propose_rows: Any


def tree_kernels() -> TreeKernels | None:
    """None: scan."""
    return load_trees() if choice() == "auto" else None


@cache
def load_trees() -> TreeKernels | None:
    """Compile, or load what was compiled before; None with one warning where that fails."""
    with compiling_said("long episodes"), falling_back("searches of long episodes"):
        return compile_trees()
    return None


def compile_trees() -> TreeKernels:
    """Compile the kernels of trees."""
    from sparsemem.kernels.tree import ENTRIES, enter_rows, propose_rows

    compile_all(ENTRIES, torch.float32)
    like, _ = likeness(torch.float32)
    return TreeKernels(like, enter_rows, propose_rows)
