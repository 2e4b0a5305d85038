"""What all tests share: checks of types, seeds, devices, Triton's interpreter, real data."""

import functools
import os
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import jaxtyping
import pytest

from tests.checking import sampler

sampler.install("sparsemem")

import torch  # noqa: E402

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:  # Triton's kernels run in its interpreter, which is chosen when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent

# Times vary too much on shared machines for a deadline on single examples.
hypothesis.settings.register_profile("sparsemem", deadline=None)
hypothesis.settings.load_profile("sparsemem")


@pytest.fixture
def plain_errors():
    """Let bad arguments through the shape checker, to reach the library's own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _deterministic_start():
    sampler.new_test()
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """Devices that everything works on."""
    if request.param == "cuda" and not HAS_CUDA:
        pytest.skip("needs a GPU")
    return torch.device(request.param)


def mended_interpreter() -> None:
    """Triton 3.6's interpreter, working beside NumPy 2.4 and in less than half the time.

    It asks for arrays of one number as indices, which NumPy refuses; it prepares the whole language
    at every call of a function by a kernel, where it has done so for the kernel; and it works types
    of numbers and shapes out anew each time.
    """
    import triton.language
    from triton.runtime import interpreter

    patch, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    modules = {"tl": triton.language, "core": triton.language.core}

    def patch_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(self, *arguments, **named):
        return self.rewrite()(*arguments, **named)

    interpreter._patch_lang = lambda _: patch(SimpleNamespace(__globals__=modules))
    interpreter._patch_lang_tensor = patch_index
    interpreter.InterpretedFunction.__call__ = call
    remember_dtypes(interpreter, triton.language.core)
    remember_shapes(triton.language.core)
    multiply_bfloat16(interpreter)


def remember_dtypes(interpreter, core) -> None:
    """NumPy's dtype of numbers is looked for once."""
    dtype_of = interpreter._get_np_dtype
    of_numbers = functools.cache(dtype_of)

    def dtype_for(kind):
        scalar = kind.element_ty if isinstance(kind, core.block_type) else kind
        return dtype_of(kind) if isinstance(scalar, core.pointer_type) else of_numbers(scalar)

    interpreter._get_np_dtype = dtype_for


def remember_shapes(core) -> None:
    """The type of a tuple of whole numbers, as a shape is, is made once."""
    type_of = core._type_for_tuple_values
    of_numbers = functools.cache(type_of)

    def type_for(values, fields=None):
        numbers = tuple(getattr(value, "value", value) for value in values)
        if fields is None and all(type(number) is int for number in numbers):
            return of_numbers(numbers)
        return type_of(values, fields)

    core._type_for_tuple_values = type_for


def multiply_bfloat16(interpreter) -> None:
    """Its product of bfloat16 tensors is one of their bits, as whole numbers: now of the values."""
    import triton.language

    dot = interpreter.InterpreterBuilder.create_dot

    def values(tensor):
        if tensor.dtype.scalar != triton.language.bfloat16:
            return tensor
        bits = tensor.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), triton.language.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, values(a), values(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def _triton():
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    if not HAS_CUDA:
        mended_interpreter()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def triton_device(request, monkeypatch, _triton) -> torch.device:
    """A device that Triton's kernels run on: the CPU by their interpreter, or else a GPU."""
    if (request.param == "cuda") != HAS_CUDA:
        pytest.skip("needs a GPU" if request.param == "cuda" else "kernels are compiled here")
    if request.param == "cpu":
        monkeypatch.setenv("SPARSEMEM_KERNELS", "triton")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root folder of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets: SPARSEMEM_DATA, or ../shared/data beside the repository."""
    named = os.environ.get("SPARSEMEM_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if named and not folder.is_dir():
        # A wrong name must not look like a machine without the data.
        pytest.fail(f"SPARSEMEM_DATA is {named!r}, expected an existing folder")
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets: SPARSEMEM_DATA is not set, {folder} does not exist")
    return folder
