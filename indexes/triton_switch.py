"""Whether a Triton kernel is to be used: the one switch of all code that has them.

`SPARSEMEM_KERNELS` in the environment: `auto`, the default, takes a kernel wherever there is one;
`reference` has the torch code used everywhere; `triton` has Triton's kernels used on CPU tensors
too, in Triton's interpreter, which is slow and for tests. Nothing here imports Triton before a
kernel is needed; modules with kernels are imported where they are launched.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

SWITCH = "SPARSEMEM_KERNELS"
CHOICES = ("auto", "reference", "triton")
LEAST = (3, 4)  # of Triton: what a compiled kernel is called with was another before


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
    if find_spec("triton") is None:
        raise RuntimeError(f"{SWITCH} is 'triton', expected Triton to be installed")
    if not interprets():
        raise RuntimeError(
            f"{SWITCH} is 'triton' and a tensor on the CPU, expected Triton's interpreter:"
            " TRITON_INTERPRET=1 in the environment before triton is first imported"
        )
    return True


@cache
def has_triton() -> bool:
    """Whether Triton is installed, of a version that `launching` knows; for NVIDIA's GPUs only."""
    if torch.version.hip is not None:
        return False
    if find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: torch's operations are used in the place of kernels, which"
            " takes up to ten times as long (on Linux sparsemem[gpu] brings Triton)",
            stacklevel=3,
        )
        return False
    import triton

    if release(triton.__version__) >= LEAST:
        return True
    warnings.warn(
        f"triton is {triton.__version__}, expected {'.'.join(map(str, LEAST))} or later: torch's"
        " operations are used in the place of kernels",
        stacklevel=3,
    )
    return False


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


@cache
def interprets() -> bool:
    """Whether Triton was imported as an interpreter."""
    if not has_triton():
        return False
    import triton.language as language
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(language.zeros, InterpretedFunction)
