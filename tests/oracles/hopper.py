"""Triton's compiler without a GPU: kernels are compiled for an H100 and not run.

`with compiled_for_hopper() as made:` has every launch compile its kernel from the arguments that
it is given (CPU tensors will do) down to machine code, and fills nothing in. `made` are the
compiled kernels. For a process of its own, where Triton was not imported as an interpreter.
"""

from contextlib import contextmanager
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver


class Hopper:
    """As much of a driver as compiling asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@contextmanager
def compiled_for_hopper():
    made, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **named):
        made.append(run(self, *arguments, grid=grid, warmup=True, **named))

    driver.set_active(Hopper())
    with mock.patch.object(JITFunction, "run", compile_only):
        yield made
