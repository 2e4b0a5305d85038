"""Launches of Triton's kernels, without what Triton does anew for each of them.

`program[grid](...)` finds out for what the kernel was compiled: dtypes, which addresses and whole
numbers are divisible by 16, which numbers are 1 or need 64 bits, and the constants. On the host of
an H200 a search of two launches took 162 us so. `launch` keeps the compiled kernel of each such
combination, and hands it its arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

# The compiled kernel, constants that it is given last, and the program, whose id is in the key.
_compiled: dict[Any, tuple[Any, tuple[Any, ...], Any]] = {}


def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """As `program[grid](*arguments, **constants)`.

    Arguments are those that are not `constexpr`, in order, the first a tensor; constants are the
    others, and options such as num_warps. In the interpreter nothing is compiled, nor kept.
    """
    device = arguments[0].get_device()
    key = (id(program), device, tuple(map(kind_of, arguments)), tuple(constants.items()))
    if key in _compiled:
        compiled, rest, _ = _compiled[key]
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
        return
    compiled = program[grid](*arguments, **constants)
    if compiled is not None:
        names = program.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names), program


def kind_of(argument: Any) -> Any:
    """What of an argument a kernel is compiled for; finer than Triton's distinctions for NVIDIA."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if type(argument) is int:
        bits = -(2**31) <= argument < 2**31, argument < 2**63
        return argument == 1, argument % 16 == 0, bits
    return type(argument)
