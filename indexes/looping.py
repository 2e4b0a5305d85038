"""How functions are compiled, and what is kept of them on disk. Importing this imports Numba."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, call-arg"
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.errors import NumbaError
from numba.extending import intrinsic

LINE = 64  # bytes that come from memory together
MOST_FETCHED = 512  # bytes of a row that are asked for ahead

# A sum may be added up in any order, and a product added without rounding it first: so loops run
# on vectors. Not-a-numbers and infinities are left as they are.
OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract"},
}


def files_of(*modules: ModuleType) -> list[Path]:
    """Where modules lie."""
    return [Path(inspect.getfile(module)) for module in modules]


def stamp_of(files: Iterable[Path]) -> str:
    """Another one whenever one of the files is."""
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def compiled(function: Callable[..., Any], stamp: str, **options: Any) -> Any:
    """A function that Numba compiles, and makes anew when the stamp is another one.

    By itself it looks at the function's file alone, and not at constants and functions of others.
    """
    function = inspect.unwrap(function)  # without a type checker's wrapper
    options = {**OPTIONS, **options}
    try:
        made: Any = numba.njit(function, cache=True, **options)
    except (RuntimeError, NumbaError):  # there is no folder that a cache could be written to
        return numba.njit(function, **options)
    with suppress(AttributeError):  # it is not for others to set
        made._cache._cache_file._source_stamp = stamp
    return made


@intrinsic
def fetch(_context, address):
    """Have what is at an address on its way from memory: nothing waits for it, or can fault."""
    signature = types.void(address)

    def generate(_context, builder, _signature, arguments):
        place = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        instruction = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        to_read, all_levels, data = number(0), number(3), number(1)
        builder.call(instruction, [place, to_read, all_levels, data])
        return None

    return signature, generate


def fetch_rows(rows, ids):
    """Have rows [n, W] at `ids` on their way from memory; of wide ones the rest comes by itself.

    For others to compile.
    """
    start, size = rows.ctypes.data, rows.shape[1] * rows.itemsize
    for id in ids:
        if id >= 0:
            for offset in range(0, min(size, MOST_FETCHED), LINE):
                fetch(start + id * size + offset)
