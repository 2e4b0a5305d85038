"""Whether a Triton kernel is to be used: the one switch of all code that has them.

`SPARSEMEM_KERNELS` in the environment: `auto`, the default, takes a kernel wherever there is one;
`reference` has the torch code used everywhere; `triton` has Triton's kernels used on CPU tensors
too, in Triton's interpreter, which is slow and for tests. Nothing here imports Triton before a
kernel is needed; modules with kernels are imported where they are launched.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

from torch import Tensor

SWITCH = "SPARSEMEM_KERNELS"
CHOICES = ("auto", "reference", "triton")


def choice() -> str:
    """What the environment asks for."""
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in CHOICES:
        raise ValueError(f"{SWITCH} is {chosen!r}, expected one of {', '.join(CHOICES)}")
    return chosen


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels of Triton are to work on a tensor, and others like it."""
    chosen = choice()
    if chosen == "reference":
        return False
    if tensor.device.type == "cuda":
        return has_triton()
    if chosen != "triton" or tensor.device.type != "cpu":
        return False
    if not interprets():
        raise RuntimeError(
            f"{SWITCH} is 'triton' and a tensor on the CPU, expected Triton's interpreter:"
            " TRITON_INTERPRET=1 in the environment before triton is first imported"
        )
    return True


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@cache
def interprets() -> bool:
    """Whether Triton was imported as an interpreter."""
    if not has_triton():
        return False
    import triton.language as language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(language.zeros, InterpretedFunction)
