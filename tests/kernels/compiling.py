"""Triton's compiler without a GPU: what a launch would compile, down to the machine's code.

For a process of its own, where Triton was not imported as an interpreter.
"""

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas")


class Compiling:
    """Stands in for a kernel: `kernel[grid](...)` compiles it for those arguments, and that is all.

    Tensors count as aligned; whole numbers are neither 1 nor multiples of 16.
    """

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments, **named):
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        given = {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **named}
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(self.kernel.params):
            name, value = parameter.name, given[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.compiled.append(triton.compile(source, target=H100, options=options))


def replaced(module, *names):
    """Has the kernels of these names in a module compiled instead of launched."""
    kernels = [Compiling(getattr(module, name)) for name in names]
    for name, kernel in zip(names, kernels, strict=True):
        setattr(module, name, kernel)
    return kernels
